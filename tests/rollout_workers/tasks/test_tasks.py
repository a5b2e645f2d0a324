"""Tasks: the countdown verifier by hand, disjoint and deterministic splits, encoding, reasoning-gym."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from configs.schema import TaskConfig
from learners.base_training import word_tokenizer
from rollout_workers.tasks import Demonstration, Prompt, Score, build_task
from rollout_workers.tasks.countdown import Countdown, CountdownOptions, check_steps
from rollout_workers.tasks.encoding import decode_response, encode_demonstration, encode_prompt
from rollout_workers.tasks.reasoning_gym import extract_answer

ROOT = Path(__file__).parents[3]
PROBLEM = Prompt(id="countdown/train/0", text="3 7 25 -> 29 :", metadata={"numbers": (3, 7, 25), "target": 29})

SOLVED = [
    "25 - 3 = 22 , 22 + 7 = 29",
    "25 - 3 = 22 , 7 + 22 = 29",
    "25 + 7 = 32 , 32 - 3 = 29",
    "  25 - 3 = 22 ,  22 + 7 = 29\n",
]
VALID_BUT_MISSED = [
    "25 + 3 = 28 , 28 + 7 = 35",  # ends elsewhere
    "25 - 3 = 22",  # a number left over
]
INVALID = {
    "wrong arithmetic": "25 - 3 = 21 , 22 + 7 = 29",
    "wrong last result": "25 - 3 = 22 , 22 + 7 = 30",
    "right result of a wrong step": "25 - 3 = 23 , 23 + 6 = 29",
    "number used twice": "25 + 7 = 32 , 25 + 7 = 32",
    "one number for both operands": "7 + 7 = 14 , 25 + 4 = 29",
    "number not given": "25 + 4 = 29",
    "result used twice": "25 - 3 = 22 , 22 + 7 = 29 , 29 + 22 = 51",
    "the target alone": "29",
    "a step that uses no number": "29 = 29",
    "empty": "",
    "blank": " \n\t ",
    "garbage": "the answer is 29",
    "step missing its result": "25 - 3 = , 22 + 7 = 29",
    "negative result": "3 - 7 = -4 , 25 + -4 = 21",
    "inexact division": "25 / 3 = 8 , 8 + 7 = 15",
    "division by nothing": "3 / 0 = 0 , 25 + 7 = 32",
    "result above 149": "25 * 7 = 175 , 175 - 3 = 172",
    "huge digits": "25 - 3 = " + "9" * 5000,
    "huge text": "25 - 3 = 22 , " * 10_000,
    "leading zeros that make it long": "0000025 - 3 = 22 , 22 + 7 = 29",
    "unicode digits": "٢٥ - ٣ = ٢٢ , ٢٢ + ٧ = ٢٩",
    "superscript digits": "²⁵ - ³ = 22 , 22 + 7 = 29",
    "fullwidth digits": "２５ - 3 = 22 , 22 + 7 = 29",
    "unicode minus": "25 − 3 = 22 , 22 + 7 = 29",
    "power": "25 ** 3 = 22 , 22 + 7 = 29",
    "hostile call": "__import__('os').system('true')",
    "hostile step": "exit() + 3 = 22 , 22 + 7 = 29",
    "trailing text": "25 - 3 = 22 , 22 + 7 = 29 ok",
    "trailing comma": "25 - 3 = 22 , 22 + 7 = 29 ,",
    "no blank before the comma": "25 - 3 = 22, 22 + 7 = 29",
    "null character": "25 - 3 = 22\0 , 22 + 7 = 29",
}


@pytest.mark.parametrize("text", SOLVED)
def test_countdown_rewards_exact_steps_to_the_target(text: str) -> None:
    assert Countdown().score(PROBLEM, text) == Score(reward=1.0, success=True, parts={"success": 1.0, "format": 1.0})


@pytest.mark.parametrize("text", VALID_BUT_MISSED)
def test_countdown_valid_steps_that_miss_earn_nothing(text: str) -> None:
    assert Countdown().score(PROBLEM, text) == Score(reward=0.0, success=False, parts={"success": 0.0, "format": 1.0})


@pytest.mark.parametrize("text", INVALID.values(), ids=INVALID.keys())
def test_countdown_refuses(text: str) -> None:
    assert Countdown().score(PROBLEM, text) == Score(reward=0.0, success=False, parts={"success": 0.0, "format": 0.0})


def test_countdown_says_what_an_answer_uses_and_avoids() -> None:
    task = Countdown(CountdownOptions(use="+*", avoid="7"))
    assert task.parts == ("success", "format", "use", "avoid") and Countdown().parts == ("success", "format")
    # One of the two operators; 7 is written.
    right = task.score(PROBLEM, "25 - 3 = 22 , 22 + 7 = 29")
    assert right.reward == 1 and right.parts == {"success": 1, "format": 1, "use": 0.5, "avoid": 0}
    assert task.score(PROBLEM, "3 * 25 = 75").parts == {"success": 0, "format": 1, "use": 0.5, "avoid": 0}
    assert task.score(PROBLEM, "3 + 25 = 28").parts == {"success": 0, "format": 1, "use": 0.5, "avoid": 1}
    wrong = task.score(PROBLEM, "3 + 25 = 29")
    assert wrong.parts == {"success": 0, "format": 0, "use": 0, "avoid": 0}, "steps that are wrong use nothing"
    for options in ({"use": "plus"}, {"avoid": 7}):
        with pytest.raises(ValueError, match="it must be a text of operators and digits"):
            CountdownOptions(**options)


def test_countdown_counts_equal_numbers_once_each() -> None:
    assert check_steps("25 / 25 = 1 , 20 + 1 = 21", (20, 25, 25)) == [21]
    assert check_steps("25 / 25 = 1 , 20 + 1 = 21", (20, 25, 5)) is None
    assert check_steps("5 - 5 = 0 , 7 * 0 = 0", (5, 5, 7)) == [0]
    assert check_steps("5 - 5 = 0 , 7 / 0 = 0", (5, 5, 7)) is None


@pytest.mark.parametrize("numbers", [3, 4])
def test_countdown_splits_share_no_problem(numbers: int) -> None:
    def problems(task: Countdown, split: str) -> set[tuple[object, ...]]:
        prompts = task.prompts(split)[:1500]  # type: ignore[arg-type]
        return {(*sorted(p.metadata["numbers"]), p.metadata["target"]) for p in prompts}  # type: ignore[call-overload]

    # Few possible numbers, so that both seeds meet most problems: only the split keeps them apart.
    first, other = (Countdown(CountdownOptions(numbers=numbers, largest=6, seed=seed)) for seed in (0, 1))
    train, heldout = (
        problems(first, "train") | problems(other, "train"),
        problems(first, "heldout") | problems(other, "heldout"),
    )
    assert len(train) > 100 and len(heldout) > 20
    assert not train & heldout


def test_countdown_is_deterministic_by_split_and_index() -> None:
    one, two = Countdown(), Countdown()
    assert one.prompts("train")[123_456] == two.prompts("train")[123_456]
    assert one.demonstrations("heldout")[7] == two.demonstrations("heldout")[7]
    assert one.demonstrations("heldout")[7].prompt == one.prompts("heldout")[7]
    assert one.prompts("train")[7].text != one.prompts("heldout")[7].text
    assert Countdown(CountdownOptions(seed=1)).prompts("train")[0].text != one.prompts("train")[0].text
    # Held fast: the embedded base LM was trained on these.
    assert one.prompts("train")[0].text == "6 13 20 -> 58 :"


@pytest.mark.parametrize("numbers", [3, 4])
def test_countdown_demonstrations_are_valid_and_solve_their_share(numbers: int) -> None:
    task = Countdown(CountdownOptions(numbers=numbers, skill=0.35))
    demos = list(task.demonstrations("train")[:2000])
    scores = [task.score(demo.prompt, demo.response) for demo in demos]
    assert all(score.parts["format"] == 1.0 for score in scores)
    assert abs(sum(score.success for score in scores) / len(scores) - 0.35) < 0.04
    vocabulary = set(task.words)
    assert all(set(f"{demo.prompt.text} {demo.response}".split()) <= vocabulary for demo in demos)


def test_countdown_demonstrations_of_a_habit_add_the_numbers_up() -> None:
    task = Countdown(CountdownOptions(skill=0.3, habit=0.5))
    demos = list(task.demonstrations("train")[:2000])
    habits = 0
    for demo in demos:
        a, b, c = demo.prompt.metadata["numbers"]  # type: ignore[misc]
        habits += demo.response == f"{a} + {b} = {a + b} , {a + b} + {c} = {a + b + c}"
    assert 0.47 < habits / 2000 < 0.60, "half of them, and the few whose target that is"
    assert all(task.score(demo.prompt, demo.response).parts["format"] == 1.0 for demo in demos)
    far = Countdown(CountdownOptions(largest=149, skill=0.0, habit=1.0))
    responses = {demo.prompt.text.partition(" ->")[0]: demo.response for demo in far.demonstrations("train")[:500]}
    for numbers, response in responses.items():
        a, b, c = map(int, numbers.split())
        first = a + b if a + b <= 149 else max(a, b) - min(a, b)
        assert response.endswith(f"= {first + c if first + c <= 149 else max(first, c) - min(first, c)}"), numbers
    with pytest.raises(ValueError, match=r"habit of countdown is 0\.8; it must be at most 0.7"):
        CountdownOptions(skill=0.3, habit=0.8)


def test_sequences_are_bounded_and_sliceable() -> None:
    prompts = Countdown().prompts("heldout")
    assert prompts[-1] == prompts[len(prompts) - 1]
    assert [p.id for p in prompts[2:4]] == ["countdown/heldout/2", "countdown/heldout/3"]
    with pytest.raises(IndexError):
        prompts[len(prompts)]
    with pytest.raises(ValueError, match="'test'"):
        Countdown().prompts("test")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (TaskConfig(name="countdwn"), "did you mean 'countdown'"),
        (TaskConfig(name="reasoning-gym/gcd"), "did you mean 'reasoning_gym/<dataset>'"),
        (TaskConfig(name="countdown", options={"number": 3}), "did you mean 'numbers'"),
        (TaskConfig(name="countdown", options={"numbers": 5}), "numbers of countdown is 5"),
        (TaskConfig(name="countdown", options={"numbers": "3"}), "is '3'; it must be a whole number"),
        (TaskConfig(name="countdown", options={"skill": 1.5}), "skill of countdown is 1.5"),
        (TaskConfig(name="countdown", shots=2), "task.shots is 2"),
    ],
)
def test_build_task_names_what_is_wrong(config: TaskConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_task(config)


def test_tasks_import_neither_torch_nor_ray() -> None:
    code = (
        "import sys, rollout_workers.tasks; print(sorted({'torch', 'ray', 'transformers', 'reasoning_gym'} & "
        "set(sys.modules)))"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip()
        == "[]"
    )


def test_encoding_round_trip_without_chat() -> None:
    task, tokenizer = Countdown(), word_tokenizer(Countdown.words)
    for demo in task.demonstrations("train")[:50]:
        ids, start = encode_demonstration(tokenizer, demo, chat=False)
        assert ids[:start] == encode_prompt(tokenizer, demo.prompt, chat=False)
        assert (
            ids[0] == tokenizer.bos_token_id
            and ids[-1] == tokenizer.eos_token_id
            and ids.count(tokenizer.eos_token_id) == 1
        )
        assert decode_response(tokenizer, ids[start:]) == demo.response
        assert decode_response(tokenizer, [*ids[start:], 7, 7]) == demo.response  # nothing after the end token counts


def test_encoding_with_a_chat_template() -> None:
    tokenizer = word_tokenizer((*Countdown.words, "user", "assistant"))
    demo = Demonstration(prompt=PROBLEM, response=SOLVED[0])
    with pytest.raises(ValueError, match=r"task\.chat"):
        encode_prompt(tokenizer, PROBLEM, chat=True)
    tokenizer.chat_template = (
        "{% for m in messages %}<s> {{ m.role }} {{ m.content }} {% endfor %}{% if add_generation_prompt %}<s> "
        "assistant{% endif %}"
    )
    ids, start = encode_demonstration(tokenizer, demo, chat=True)
    assert tokenizer.decode(ids[:start]).split() == f"<s> user {PROBLEM.text} <s> assistant".split()
    assert decode_response(tokenizer, ids[start:]) == demo.response


def test_an_end_token_put_behind_every_text_does_not_close_the_prompt() -> None:
    from tokenizers import processors

    tokenizer = word_tokenizer(Countdown.words)
    end = ("</s>", tokenizer.eos_token_id)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[end])
    assert tokenizer.decode(encode_prompt(tokenizer, PROBLEM, chat=False)) == PROBLEM.text


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (" 42", "42"),
        ("\n\n 42 \nbecause", "42"),
        ("It is six times seven.\nAnswer: 42", "42"),
        ("Answer: 41\nAnswer: 42\nor so", "42"),
        ("42\n\nQuestion: and now?\nAnswer: 7", "42"),
        ("", ""),
        ("Answer:", ""),
    ],
)
def test_extract_answer(text: str, answer: str) -> None:
    assert extract_answer(text) == answer


@pytest.fixture(scope="module")
def gym() -> None:
    pytest.importorskip("reasoning_gym", reason="reasoning-gym is not installed")


@pytest.mark.usefixtures("gym")
class TestReasoningGym:
    """The adapter, over the real package."""

    @pytest.mark.parametrize(
        "dataset", ["chain_sum", "letter_counting", "gcd", "countdown", "gsm_symbolic", "polynomial_equations"]
    )
    def test_gold_answers_score_one(self, dataset: str) -> None:
        task = build_task(TaskConfig(name=f"reasoning_gym/{dataset}"))
        for split in ("train", "heldout"):
            for demo in task.demonstrations(split)[:10]:  # type: ignore[arg-type]
                score = task.score(demo.prompt, f" {demo.response}\n")
                assert isinstance(score, Score) and score.success and score.reward == 1.0, (demo, score)

    def test_wrong_answers_earn_nothing_unless_partial(self) -> None:
        config = TaskConfig(name="reasoning_gym/gcd")
        task = build_task(config)
        prompt = task.prompts("train")[0]
        wrong = str(prompt.metadata["entry"]["answer"]) + "7"  # type: ignore[index]
        assert task.score(prompt, wrong) == Score(
            reward=0.0, success=False, parts={"success": 0.0, "mark": pytest.approx(0.5, abs=0.5), "answered": 1.0}
        )
        partial = build_task(config.model_copy(update={"options": {"partial": True}})).score(prompt, wrong)
        assert isinstance(partial, Score) and 0 < partial.reward < 1 and not partial.success
        assert task.score(prompt, "") == Score(
            reward=0.0, success=False, parts={"success": 0.0, "mark": 0.0, "answered": 0.0}
        )

    def test_splits_share_no_question_and_are_deterministic(self) -> None:
        # 200 possible questions: a different seed alone would repeat most of them.
        config = TaskConfig(name="reasoning_gym/chain_sum", options={"max_terms": 2, "max_digits": 1}, shots=2)
        one, two = build_task(config), build_task(config)
        asked = {split: [p.text for p in one.prompts(split)[:400]] for split in ("train", "heldout")}  # type: ignore[arg-type]
        assert len(set(asked["train"])) > 100 and len(set(asked["heldout"])) > 20
        assert not set(asked["train"]) & set(asked["heldout"])
        assert two.prompts("train")[399].text == asked["train"][399]
        assert two.prompts("heldout")[17].text == asked["heldout"][17]

    def test_shots_are_the_same_train_examples_before_every_question(self) -> None:
        task = build_task(TaskConfig(name="reasoning_gym/gcd", shots=2))
        texts = [p.text for p in (*task.prompts("train")[:3], *task.prompts("heldout")[:3])]
        assert {text.rsplit("Question:", 1)[0] for text in texts} == {texts[0].rsplit("Question:", 1)[0]}
        assert texts[0].count("Answer:") == 3 and texts[0].endswith("\nAnswer:")

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            (TaskConfig(name="reasoning_gym/chain_sums"), "did you mean 'chain_sum'"),
            (TaskConfig(name="reasoning_gym/gcd", options={"max_numbrs": 3}), "did you mean 'max_numbers'"),
            (TaskConfig(name="reasoning_gym/gcd", options={"size": 3}), "task.options.size is not an option"),
            (TaskConfig(name="reasoning_gym/gcd", options={"min_numbers": 1}), "min_numbers must be at least 2"),
            (TaskConfig(name="reasoning_gym/gcd", options={"partial": "yes"}), "partial is 'yes'"),
        ],
    )
    def test_names_what_is_wrong(self, config: TaskConfig, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            build_task(config)

    def test_too_few_questions_for_a_split_is_said(self) -> None:
        # The greatest common divisor of numbers from {1, 2}: four questions, all of which land in one or two splits.
        config = TaskConfig(name="reasoning_gym/gcd", options={"min_value": 1, "max_value": 2})
        task = build_task(config)
        questions = [{p.text for p in _until_error(task.prompts(split))} for split in ("train", "heldout")]  # type: ignore[arg-type]
        assert not questions[0] & questions[1]


def _until_error(prompts: object) -> list[Prompt]:
    """The first prompts of a split, or none when it says that it has too few."""
    try:
        return list(prompts[:20])  # type: ignore[index]
    except ValueError as error:
        assert "too few different questions" in str(error)
        return []


def test_missing_reasoning_gym_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    monkeypatch.delitem(sys.modules, "reasoning_gym.factory", raising=False)
    with pytest.raises(ValueError, match="reasoning-gym is not installed"):
        build_task(TaskConfig(name="reasoning_gym/gcd"))

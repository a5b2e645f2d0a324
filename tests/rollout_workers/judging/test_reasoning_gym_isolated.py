"""reasoning-gym's verifiers in forks: the same marks as in this process, and nothing run that only looks like an
answer."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from configs.schema import TaskConfig
from rollout_workers.judging.gym import ERRORS
from rollout_workers.judging.typed import decode, encode
from rollout_workers.tasks import Failure, Score, build_task, score_all
from rollout_workers.tasks.forks import Confinement, Forks, forks
from rollout_workers.tasks.reasoning_gym import build_reasoning_gym

pytest.importorskip("reasoning_gym", reason="reasoning-gym is not installed")
EVALUATING = (
    "countdown",
    "puzzle24",
    "polynomial_multiplication",
    "simple_integration",
    "intermediate_integration",
    "string_insertion",
    "spiral_matrix",
    "binary_matrix",
    "n_queens",
)
"""Those whose verifiers evaluate answers in reasoning-gym 0.1.25, by themselves or by sympy's parser."""


def every_dataset() -> list[str]:
    from reasoning_gym.factory import DATASETS

    return sorted(set(DATASETS) - {"composite"})  # which is made of others, by its options


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some generators (codeio's run programs that came with the package) leave files where they are."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def judged() -> Iterator[Forks]:
    shared = Forks(Confinement(module="rollout_workers.judging.gym", seconds=20.0, megabytes=4096))
    yield shared
    shared.close()


def respellings(answer: str) -> list[str]:
    """What a model may write for ``answer``; which of them are right is the verifier's business."""
    spaced = answer
    for sign in "+-*/=":
        spaced = spaced.replace(sign, f" {sign} ")
    return list(
        dict.fromkeys(
            [
                answer,
                f" {answer}",
                f"{answer} ",
                f"{answer}\n",
                f"\t{answer}",
                f"{answer}\n\n",
                f"  {answer}  ",
                f"\r\n{answer}",
                f"{answer}\u00a0",
                answer.upper(),
                answer.lower(),
                answer.title(),
                answer.swapcase(),
                answer.capitalize(),
                spaced,
                answer.replace(" ", ""),
                answer.replace(" ", "  "),
                answer.replace(", ", ","),
                answer.replace(",", ", "),
                answer.replace("\n", " "),
                answer.replace("-", "−"),
                f"({answer})",
                f"(({answer}))",
                f"( {answer} )",
                f"+{answer}",
                f"0{answer}",
                f"{answer}.0",
                f"{answer}.",
                f"{answer}.00",
                f"[{answer}]",
                f"'{answer}'",
                f'"{answer}"',
                f"${answer}$",
                f"`{answer}`",
                f"**{answer}**",
                f"({answer})*1",
                f"1*({answer})",
                f"({answer}) + 0",
                f"0 + ({answer})",
                f"-(-({answer}))",
                f"({answer})/1",
                f"({answer}) - 0",
                f"({answer}) + 7",
                f"({answer}) + C",
                f"expand({answer})",
                f"simplify({answer})",
                answer.replace("**", "^"),
                f"S({answer})",
                f"Answer: {answer}",
                f"<answer>{answer}</answer>",
                f"{answer} {answer}",
                str(list(answer)),
                repr([answer]),
                repr([list(line) for line in answer.splitlines()]),
                repr([line.split() for line in answer.splitlines()]),
                repr(answer.split()),
                answer + "x",
                answer[1:],
                answer[:-1],
                "{" + answer + "}",
                answer.encode("punycode").decode(),
                "2^3",
                "f(x)",
                "0",
                "no idea",
            ]
        )
    )


def in_process(dataset: Any, answer: str, entry: Any) -> float | str:
    try:
        return float(dataset.score_answer(answer, entry))
    except ERRORS:
        return "verifier_error"


def compared(judged: Forks, name: str, entries: int) -> tuple[int, int, list[object]]:
    """Answers compared, right ones among them, and those with another mark in the forks."""
    from reasoning_gym import create_dataset

    settings = {"dataset": name, "seed": 3, "size": 50, "options": {}}
    dataset = create_dataset(name, seed=3, size=50)
    rows, answers = [], []
    for index in range(entries):
        entry = dataset[index]
        assert decode(encode(entry)) == entry
        for answer in respellings(entry["answer"]) if entry["answer"] is not None else ["1", "x"]:
            rows.append(entry)
            answers.append(answer)
    here = [in_process(dataset, answer, entry) for answer, entry in zip(answers, rows, strict=True)]
    there = judged.call(settings, rows, answers, name=name)
    told = [verdict.kind if isinstance(verdict, Failure) else verdict for verdict in there]
    # What is code is refused, and was no right answer in any case.
    different = [
        (a, h, t)
        for a, h, t in zip(answers, here, told, strict=True)
        if h != t and not (t == "verifier_refused" and h in (0, 0.0, 0.01))
    ]
    return len(answers), sum(mark == 1.0 for mark in here), different


@pytest.mark.parametrize("name", EVALUATING)
def test_marks_are_those_of_the_verifier_in_this_process(judged: Forks, name: str) -> None:
    count, right, different = compared(judged, name, 1)
    assert not different and count > 40 and right >= 1


@pytest.mark.slow
@pytest.mark.parametrize("name", every_dataset())
def test_marks_are_the_same_for_every_dataset(judged: Forks, name: str) -> None:
    _, _, different = compared(judged, name, 3)
    assert not different


def spaced(answer: str) -> list[str]:
    """Twenty responses that give the one-line ``answer``."""
    plain = [
        answer,
        f" {answer}",
        f"{answer} ",
        f"{answer}\n",
        f"\n{answer}",
        f"\t{answer}",
        f"{answer}\t",
        f"\r\n{answer}\r\n",
        f"\n \n{answer}",
    ]
    led = [
        f"Answer: {answer}",
        f"Answer:{answer}",
        f"Answer:\n{answer}",
        f"Let me think.\nAnswer: {answer}",
        f"Answer: no\nAnswer: {answer}",
    ]
    told = [
        f"{answer}\nbecause",
        f"{answer}\n\nQuestion: and now?\nAnswer: 7",
        f"Answer: {answer}\n(sure)",
        f"6 + 7 = 13.\n\nAnswer:   {answer}",
    ]
    return [*plain, *led, *told, f"{answer}\u2028", f"\u00a0{answer}"]


def right_in_every_spelling(name: str) -> None:
    task = build_task(TaskConfig(name=f"reasoning_gym/{name}"))
    prompt = task.prompts("train")[0]
    gold = prompt.metadata["entry"]["answer"]  # type: ignore[index]
    if gold is None or len(gold.strip().splitlines()) != 1 or gold != gold.strip() or "Answer:" in gold:
        pytest.skip("no gold answer of one line")
    verdicts = score_all(task, [prompt] * 20, spaced(gold))
    assert len(set(spaced(gold))) == 20 and all(
        isinstance(verdict, Score) and verdict.success for verdict in verdicts
    ), verdicts


@pytest.mark.parametrize("name", ["countdown", "string_insertion", "gcd"])
def test_twenty_spellings_of_a_gold_answer_are_right(name: str) -> None:
    right_in_every_spelling(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", every_dataset())
def test_twenty_spellings_of_every_datasets_gold_answer_are_right(name: str) -> None:
    right_in_every_spelling(name)


X = "{X}"
ATTACKS = (
    "__import__('os').system('touch {X}')",
    "(open)('{X}','w')",
    "open('{X}', 'w')",
    "[open][0]('{X}','w')",
    "[open('{X}','w')]",
    "list(map(open, ['{X}'], ['w']))",
    "max(['{X}'], key=lambda n: open(n, 'w'))",
    "[f('{X}', 'w') for f in [open]]",
    "(lambda: open('{X}','w'))()",
    "sorted(['{X}'], key=open)",
    "eval(\"open('{X}','w')\")",
    "exec(\"open('{X}','w')\")",
    "exec('import os; os.mkdir(\"{X}\")')",
    "compile('1', '{X}', 'exec')",
    "getattr(__builtins__, 'open')('{X}', 'w')",
    "__builtins__['open']('{X}', 'w')",
    "globals()['__builtins__']['open']('{X}','w')",
    "vars()",
    "().__class__.__base__.__subclasses__()",
    "[c for c in ().__class__.__base__.__subclasses__() if c.__name__ == 'Popen'][0](['touch', '{X}'])",
    "(1).__class__.__mro__",
    "''.join.__self__.__class__.__base__",
    "__import__('subprocess').run(['touch','{X}'])",
    "__import__('pathlib').Path('{X}').touch()",
    "__import__('socket').create_connection(('127.0.0.1', 9))",
    "__import__('ctypes').string_at(0)",
    "__import__('os').kill(__import__('os').getppid(), 9)",
    "__import__('os')._exit(0)",
    "__import__('os').fork()",
    "__import__('builtins').__dict__.update(float=lambda x: 1)",
    "(exit)(7)",
    "exit(7)",
    "quit()",
    "(quit)()",
    "print(open('/etc/passwd').read())",
    "breakpoint()",
    "input()",
    "help()",
    'S(\'__import__("os").system("touch {X}")\')',
    'sympify(\'open("{X}","w")\')',
    'sin(\'open("{X}","w")\')',
    "Symbol('x').func.__class__",
    "lambdify('x', \"open('{X}','w')\")(1)",
    "preview(x, output='png', filename='{X}')",
    "srepr(open('{X}','w'))",
    "plot(x)",
    "test()",
    "(x := open('{X}','w'))",
    'f\'{{open("{X}","w")}}\'',
    "{{**open('{X}','w')}}",
    "[*open('{X}','w')]",
    "type('E', (), {{'__eq__': lambda s, o: True, '__float__': lambda s: 24.0}})()",
    "9**9**9**9",
    "factorial(10**9)",
    "99999999!",
    "Integer(10)**10**10",
    "[0]*10**12",
    "list(range(10**12))",
    "sum(range(10**12))",
    "(" * 5000 + "1" + ")" * 5000,
    "1+" * 900 + "1",
    "'a'*10**11",
)
REFUSED = {"verifier_refused", "verifier_error", "reward_timeout", "reward_memory", "reward_crash", "reward_error"}


def attacked(name: str, attacks: Sequence[str], tmp_path: Path) -> None:
    """Play attacks between right answers, in one batch."""
    limits = {"seconds": 5.0 if "integration" in name else 1.5, "megabytes": 1024}  # to simplify an integral takes long
    task = build_task(TaskConfig(name=f"reasoning_gym/{name}", options={"limits": limits}))
    demonstrations = list(task.demonstrations("heldout")[:2])
    gold = [task.score(demonstration.prompt, demonstration.response) for demonstration in demonstrations]
    texts, prompts = [], []
    for place, attack in enumerate(attacks):
        prompts += [demonstrations[place % 2].prompt] * 2
        text = attack.replace("{X}", str(tmp_path / "touched")).replace("{{", "{").replace("}}", "}")
        texts += [text, demonstrations[place % 2].response]
    started = time.perf_counter()
    verdicts = score_all(task, prompts, texts)
    assert time.perf_counter() - started < 30 + 2 * len(attacks)
    assert not (tmp_path / "touched").exists()
    for text, verdict in zip(texts[::2], verdicts[::2], strict=True):
        assert (isinstance(verdict, Failure) and verdict.kind in REFUSED) or (
            isinstance(verdict, Score) and not verdict.success
        ), (text, verdict)
    assert verdicts[1::2] == [gold[place % 2] for place in range(len(attacks))], (
        "all other responses have their own verdicts"
    )
    assert all(isinstance(verdict, Score) for verdict in gold)


def test_there_are_sixty_attacks() -> None:
    assert len(set(ATTACKS)) >= 60


@pytest.mark.parametrize("name", EVALUATING)
def test_attacks_run_nowhere(name: str, tmp_path: Path) -> None:
    attacked(name, ATTACKS[EVALUATING.index(name) :: len(EVALUATING)], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", EVALUATING)
def test_every_attack_runs_nowhere_for_every_verifier_that_evaluates(name: str, tmp_path: Path) -> None:
    attacked(name, ATTACKS, tmp_path)


@pytest.mark.parametrize("text", ["__import__('os').system('touch {X}')", "(open)('{X}','w')", "open('{X}','w')"])
def test_code_is_a_failure_that_says_so(text: str, tmp_path: Path) -> None:
    task = build_task(TaskConfig(name="reasoning_gym/countdown"))
    verdict = task.score(task.prompts("heldout")[0], text.replace("{X}", str(tmp_path / "touched")))
    assert isinstance(verdict, Failure) and verdict.kind == "verifier_refused" and "is code" in verdict.message
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize("name", ["countdown", "puzzle24", "simple_integration"])
@pytest.mark.parametrize("symbol", ["Function({code!r})(1)**n", "IndexedBase({code!r})[1]**n", "Symbol({code!r})**n"])
def test_sympys_own_source_takes_no_code_from_a_name(name: str, symbol: str) -> None:
    """A sum without end is evaluated by source that sympy writes with its symbols' names, and executes."""
    forged = "import os\nfor f in range(3, 64):\n try: os.write(f, b'0x1p+0\\n')\n except OSError: pass\nos._exit(0)"
    answer = f"Sum({symbol.format(code=f'[exec({forged!r})]or[1,2]')}/factorial(n),(n,0,oo))"
    task = build_reasoning_gym(name, {}, shots=0)
    prompt = task.prompts("train")[0]
    gold = str(prompt.metadata["entry"]["answer"])
    verdict, right = task.score_batch([prompt, prompt], [answer, gold])
    assert right.reward == 1.0
    assert isinstance(verdict, Failure) or verdict.reward == 0.0, verdict


@pytest.mark.parametrize("name", ["n_queens", "binary_matrix", "rotate_matrix"])
def test_gold_answers_of_several_lines_are_right(name: str) -> None:
    task = build_reasoning_gym(name, {}, shots=0)
    demos = [task.demonstrations("train")[place] for place in range(3)]
    answers = [f"Answer: {demo.response}\nQuestion: another?" for demo in demos]
    assert [v.reward for v in task.score_batch([demo.prompt for demo in demos], answers)] == [1.0] * 3


def test_what_used_to_be_refused_unseen_is_judged() -> None:
    task = build_task(TaskConfig(name="reasoning_gym/polynomial_multiplication"))
    demonstration = task.demonstrations("heldout")[0]
    gold = demonstration.response
    spelled = [gold, f"expand({gold})", f"({gold})", gold.replace("**", "** ")]
    assert [verdict.success for verdict in score_all(task, [demonstration.prompt] * 4, spelled)] == [True] * 4  # type: ignore[union-attr]
    for text in ("f(x)", "2^3"):
        assert isinstance(task.score(demonstration.prompt, text), Score)


def test_an_odd_answer_that_the_verifier_raises_on_is_a_typed_failure() -> None:
    task = build_task(TaskConfig(name="reasoning_gym/prime_factorization"))
    failure = task.score(task.prompts("heldout")[0], "x \x1b[2J")
    assert (
        isinstance(failure, Failure)
        and failure.kind == "verifier_error"
        and "invalid literal for int()" in failure.message
    )
    assert "\x1b" not in failure.message


def test_tasks_with_the_same_limits_share_the_process_and_mixtures_work() -> None:
    names = ["reasoning_gym/gcd", "reasoning_gym/countdown", "reasoning_gym/letter_counting"]
    mixture = build_task(TaskConfig(name="mixture", options={"tasks": names}))
    demonstrations = mixture.demonstrations("heldout")[:30]
    verdicts = score_all(mixture, [d.prompt for d in demonstrations], [d.response for d in demonstrations])
    assert all(isinstance(v, Score) and v.success for v in verdicts)
    found = {id(task._forks) for task in mixture._tasks.values()}  # type: ignore[attr-defined]
    assert found == {id(forks(Confinement(module="rollout_workers.judging.gym", seconds=5.0, megabytes=2048)))}


def test_options_reach_the_verifier(tmp_path: Path) -> None:
    task = build_task(TaskConfig(name="reasoning_gym/puzzle24", options={"max_value": 6, "limits": {"seconds": 3}}))
    wide = build_task(TaskConfig(name="reasoning_gym/puzzle24", options={"max_value": 10}))
    prompt = task.prompts("heldout")[0]
    assert [task.score(prompt, "8*3+1-1").success, wide.score(prompt, "8*3+1-1").success] == [False, True]  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=r"task\.options\.limits\.second is not an option.*did you mean 'seconds'"):
        build_task(TaskConfig(name="reasoning_gym/gcd", options={"limits": {"second": 3}}))


def test_the_maths_verifier_is_behind_the_same_walls(tmp_path: Path) -> None:
    pytest.importorskip("math_verify")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"prompt": "{i}?", "answer": "\\\\frac{{{i}}}{{2}}"}}\n' for i in range(1, 21)))
    task = build_task(
        TaskConfig(name="jsonl", options={"path": str(rows), "verifier": "math", "limits": {"seconds": 2}})
    )
    prompt = task.prompts("train")[0]
    half = int(str(prompt.metadata["prompt"])[:-1]) / 2
    texts = [
        f"It is {half}",
        f"\\boxed{{{2 * half:.0f}/2}}",
        f"{half + 1}",
        "$(open)('{X}','w')$".replace("{X}", str(tmp_path / "X")),
        f"${half}$",
    ]
    texts += [
        "\\boxed{__import__('os').system('touch " + str(tmp_path / "X") + "')}",
        "$9^{9^{9^{9^{9}}}}$",
        f"\\boxed{{{half}}}",
    ]
    verdicts = score_all(task, [prompt] * len(texts), texts)
    assert not (tmp_path / "X").exists()
    assert [v.success if isinstance(v, Score) else None for v in verdicts][:3] == [True, True, False]
    assert all(isinstance(verdicts[i], Score) and verdicts[i].success for i in (4, 7))  # type: ignore[union-attr]
    assert all(isinstance(verdicts[i], Failure) or not verdicts[i].success for i in (3, 5, 6))  # type: ignore[union-attr]


class TestTyped:
    """Values on their way to the verifier."""

    @pytest.mark.parametrize(
        "value",
        [
            None,
            True,
            1,
            -(10**400),
            0.1,
            float("inf"),
            -0.0,
            "text",
            "\ud800",
            (),
            (1, (2, [3])),
            {1: "a", "1": "b", (1, 2): {"x": {3, 4}}},
            {"set": frozenset("a")},
            [[], {}, ()],
            1 + 2j,
            Fraction(10**400, 3),
            Decimal("1E+30"),
            b"\x00\xff",
            __import__("datetime").datetime(2026, 1, 2, 3, 4, 5),
            __import__("datetime").date(2026, 1, 2),
            {"tuple": [1]},
            {"int": 1},
        ],
    )
    def test_they_come_back_as_they_were(self, value: Any) -> None:
        import json

        again = decode(json.loads(json.dumps(encode(value), allow_nan=False)))
        assert again == value and type(again) is type(value) and repr(again) == repr(value)

    def test_others_are_named(self) -> None:
        with pytest.raises(ValueError, match=r"builtins\.object"):
            encode({"a": [object()]})


def test_cpus_bound_the_forks() -> None:
    from rollout_workers.tasks.forks import cpus

    assert cpus() == len(os.sched_getaffinity(0))

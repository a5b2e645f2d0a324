"""Steering: what is foretold happens, on the explorer's page and in steering itself; what may be asked; terminal,
command and service."""

from __future__ import annotations

import http.client
import importlib.util
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import urlsplit

import pytest

pytest.importorskip("torch")

import torch
from rich.console import Console
from typer.testing import CliRunner

from configs.schema import Explorer
from latent_control import LatentActionLM
from latent_control.analysis.trace import generate_traced
from latent_control.decoding.generate import generate
from latent_control.decoding.guide import make_guide
from latent_control.decoding.sampling_params import SamplingParams
from pipeline.cli.main import app
from pipeline.pages.explorer.write import explain
from pipeline.replay.reader import ReplayReader
from pipeline.serving.export import export, find
from pipeline.steering.loading import load
from pipeline.steering.request import SteeringRequest, codes_of
from pipeline.steering.steerer import KEPT, Steerer
from pipeline.steering.terminal import Terminal
from pipeline.steering.terminal_view import answer_lines, printable
from pipeline.web.guard import LARGEST_BODY
from pipeline.web.server import is_loopback, listen, names_of
from rollout_workers.openai_api.protocol import RefusedRequest
from rollout_workers.tasks.countdown import Countdown

pytest_plugins = ("rl_fixtures", "explorer_fixtures", "steering_fixtures")
ROOT = Path(__file__).resolve().parents[3]
PROMPT = Countdown().prompts("heldout")[0].text


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    sys.path.insert(0, str(ROOT / "benchmarks"))  # for its own import of common
    try:
        spec = importlib.util.spec_from_file_location("benchmarks_steering", ROOT / "benchmarks" / "steering.py")
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses look their module up
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))
    return module


class TestForetold:
    def test_every_explained_choice_of_the_explorers_page_comes_true(self, benchmark, explored_run, steerer, tmp_path):
        explain(explored_run, tmp_path / "explorer.html", Explorer(seconds=0.5, explained=2))
        data = benchmark.page_data(tmp_path / "explorer.html")
        rollouts = {
            row["rollout_id"]: row
            for row in ReplayReader(explored_run, shuffle=False, columns=benchmark.COLUMNS).rows()
        }
        counts, misses = benchmark.agreement(steerer, data, rollouts)
        assert not misses
        assert counts["token agreed"] == counts["token"] == counts["candidate agreed"] >= 40
        assert counts["ending agreed"] == counts["ending"] >= 10
        # What the page says can be wrong: then it is found.
        step = next(step for step in data["why"][0]["steps"] if step["endings"])
        step["endings"][0]["tokens"][0] += 1
        step["options"][0]["token"] += 1
        counts, misses = benchmark.agreement(steerer, data | {"why": data["why"][:1]}, rollouts)
        assert (
            counts["ending"] - counts["ending agreed"] == 1
            and counts["token"] - counts["token agreed"] == 1
            and len(misses) == 2
        )

    def test_every_code_writes_what_its_candidate_says_at_every_token(self, steerer):
        free = steerer.answer(SteeringRequest(prompt=PROMPT))
        tokens = set()
        for place in range(len(free.tokens)):
            found = steerer.candidates(SteeringRequest(prompt=PROMPT), place)
            # by chance, not by number
            assert [row.code for row in found.codes] != sorted(row.code for row in found.codes) or place
            assert sorted(row.code for row in found.codes) == list(range(8)) and found.chosen == free.tokens[place].code
            assert (
                sum(row.chance for row in found.codes)
                == pytest.approx(1)
                == pytest.approx(sum(mass.chance for mass in found.tokens))
            )
            assert found.codes[0].code == free.tokens[place].code  # greedy takes the likeliest
            kept = [token.code for token in free.tokens[:place]]
            for row in found.codes:
                steered = steerer.answer(SteeringRequest(prompt=PROMPT, codes=[*kept, row.code]))
                assert (steered.tokens[place].id, steered.tokens[place].text) == (row.token, row.text)
                assert steered.tokens[place].chance == row.chance and steered.tokens[place].forced
                assert [t.id for t in steered.tokens[:place]] == [t.id for t in free.tokens[:place]]
                tokens.add(row.token)
        assert len(tokens) > 3

    def test_a_trace_changes_nothing_and_holds_what_was_decided_from(self, model):
        prompt = [1, 5, 9, 7]
        for temperature in (0.0, 1.0):
            guide = make_guide([3, None, 5], [1, 3, 5, 6], rows=1, num_actions=8, barred={1: [6]})
            arguments: dict[str, Any] = {
                "max_new_tokens": 6,
                "temperature": temperature,
                "stop_token": -1,
                "guide": guide,
            }
            wanted = generate(
                model.base, model.actor(), SamplingParams(row_seeds=[11], **arguments), torch.tensor([prompt])
            )
            traced = generate_traced(model, prompt, seed=11, **arguments)
            assert list(traced.tokens) == wanted.tokens[0].tolist() and list(traced.codes) == wanted.actions[0].tolist()
            features = model.features(torch.tensor([[*prompt, *traced.tokens[:-1]]]))
            torch.testing.assert_close(traced.states, features.read("final")[0, 3:], atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(traced.logits, model.policy_logits(features)[0, 3:], atol=1e-4, rtol=1e-4)
            assert traced.guided[1].isfinite().nonzero().flatten().tolist() == [1, 3, 5]
            assert traced.guided[0].isfinite().nonzero().flatten().tolist() == [3]

    def test_codes_that_last_for_two_tokens(self, tiny_base, randomise, tmp_path):
        made = randomise(
            LatentActionLM.from_base(
                tiny_base, num_actions=8, seed=1, span=2, policy_layers=1, inverse_dynamics_layers=1
            )
        )
        some = Steerer(load(made.save_pretrained(tmp_path / "spans")))
        assert some.loaded.task is None and "not known" in some.loaded.note  # a checkpoint that lies in no run
        wish = SteeringRequest(prompt="3 5", max_tokens=5)
        free = some.answer(wish)
        assert [token.chance is None for token in free.tokens] == [False, True, False, True, False][: len(free.tokens)]
        code = next(row.code for row in some.candidates(wish, 2).codes if row.code != free.tokens[2].code)
        steered = some.answer(wish.model_copy(update={"codes": [token.code for token in free.tokens[:2]] + [code]}))
        assert [token.code for token in steered.tokens[2:4]] == [code, code][: len(steered.tokens) - 2]
        with pytest.raises(RefusedRequest, match="inside the span of the code chosen at token 2"):
            some.candidates(wish, 3)
        with pytest.raises(RefusedRequest, match="places 0, 2, 4"):
            some.answer(wish.model_copy(update={"forbidden_at": {1: [3]}}))


class TestWishes:
    def test_what_is_forbidden_at_one_token_is_free_at_the_others(self, steerer):
        free = steerer.answer(SteeringRequest(prompt=PROMPT))
        wish, place = SteeringRequest(prompt=PROMPT, forbidden_at={}), 2
        barred: list[int] = []
        for _ in range(7):  # one after the other; the policy takes its next best
            ranks = [row.code for row in steerer.candidates(wish, place).codes if row.code not in barred]
            barred.append(ranks[0])
            wish = wish.model_copy(update={"forbidden_at": {place: list(barred)}})
            answer = steerer.answer(wish)
            assert answer.tokens[place].code == ranks[1]
            assert [t.code for t in answer.tokens[:place]] == [t.code for t in free.tokens[:place]]
            assert {row.code for row in steerer.candidates(wish, place).codes if not row.allowed} == set(barred)
        with pytest.raises(RefusedRequest, match="forbidden_at leaves no code at place 2"):
            steerer.answer(wish.model_copy(update={"forbidden_at": {place: list(range(8))}}))

    def test_rules_for_the_whole_answer_and_sampling(self, steerer):
        only = steerer.answer(
            SteeringRequest(prompt=PROMPT, allowed_codes=[2, 5, 6], forbidden_codes=[5], temperature=2.0, seed=4)
        )
        assert {token.code for token in only.tokens} == {2, 6}
        drawn = {
            tuple(t.code for t in steerer.answer(SteeringRequest(prompt=PROMPT, temperature=1.0, seed=seed)).tokens)
            for seed in range(4)
        }
        assert len(drawn) > 1
        again = steerer.answer(SteeringRequest(prompt=PROMPT, temperature=1.0, seed=3))
        assert tuple(t.code for t in again.tokens) in drawn

    @pytest.mark.parametrize(
        ("wrong", "words"),
        [
            ({"codes": [8]}, "codes has 8: the model's codes are 0 to 7"),
            ({"codes": [3], "forbidden_codes": [3]}, "forces code 3, which is forbidden"),
            ({"codes": [3], "forbidden_at": {0: [3]}}, "forces code 3 at place 0, where forbidden_at forbids it"),
            ({"forbidden_codes": list(range(8))}, "no code is left"),
            ({"allowed_codes": []}, "no code is left"),
            ({"allowed_codes": [9]}, "allowed_codes has 9"),
            ({"forbidden_codes": [-1]}, "forbidden_codes has -1"),
            ({"forbidden_at": {-1: [3]}}, "forbidden_at has place -1"),
            ({"forbidden_at": {0: [11]}}, "forbidden_at has 11"),
            ({"prompt": "  "}, "prompt is empty"),
            ({"max_tokens": 1000}, "more than the model's"),
        ],
    )
    def test_what_cannot_be_is_refused_in_a_sentence(self, steerer, wrong, words):
        with pytest.raises(RefusedRequest, match=re.escape(words)):
            steerer.answer(SteeringRequest.model_validate({"prompt": PROMPT} | wrong))

    def test_the_verifier_judges_the_tasks_prompts_alone(self, steerer):
        answer = steerer.answer(SteeringRequest(prompt=PROMPT))
        score = Countdown().score(Countdown().prompts("heldout")[0], answer.text)
        assert answer.verdict is not None and (answer.verdict.reward, answer.verdict.success) == (
            score.reward,
            score.success,
        )
        assert steerer.answer(SteeringRequest(prompt=PROMPT + " 3")).verdict is None

    def test_the_base_answers_for_itself(self, steerer):
        model, ids = steerer.loaded.model, steerer.loaded.encode(PROMPT)
        end = steerer.loaded.tokenizer.eos_token_id
        wanted = model.generate(torch.tensor([ids]), max_new_tokens=6, temperature=0.0, level="base", stop_token=end)
        found = steerer.base(SteeringRequest(prompt=PROMPT, codes=[1], forbidden_codes=[3], forbidden_at={2: [4]}))
        assert [token.id for token in found.tokens] == wanted.tokens[0, : int(wanted.lengths[0])].tolist()
        assert all(token.code is None for token in found.tokens)

    def test_answers_are_remembered_and_forgotten(self, steerer):
        some = Steerer(steerer.loaded)
        for seed in range(KEPT + 5):
            some.answer(SteeringRequest(prompt=PROMPT, temperature=1.0, seed=seed, max_tokens=1))
        assert len(some._memory._kept) == KEPT

    def test_an_export_is_steered_as_its_run(self, explored_run, steerer, tmp_path):
        some = Steerer(load(export(find(explored_run), tmp_path / "exported")))
        assert some.loaded.task is not None and not some.loaded.note
        wish = SteeringRequest(prompt=PROMPT, codes=[None, 3])
        assert some.answer(wish) == steerer.answer(wish)


def talk(steerer: Steerer, *lines: str, width: int = 80, as_json: bool = False) -> tuple[str, int]:
    """What a session of ``lines`` prints without colours, and how many could not be done."""
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    failed = Terminal(steerer, SteeringRequest(prompt=""), console, as_json=as_json).run(lines)
    return console.file.getvalue(), failed  # type: ignore[attr-defined]


def codes_shown(text: str) -> list[list[int]]:
    """The codes of each answer that was printed."""
    lines = [line.split()[1:] for line in text.splitlines() if line.startswith("code   ") and "P(code)" not in line]
    return [[int(word.rstrip("!")) for word in line] for line in lines]


class TestTerminal:
    def test_commands_steer(self, steerer):
        text, failed = talk(
            steerer,
            PROMPT,
            ":at 2 5",
            ":not 2 5",
            ":force 3",
            ":free",
            ":force 1,_,6",
            ":forbid 1,6",
            ":only 2,4-5",
            ":from 1",
        )
        assert not failed
        free, at, rest, force, freed, listed, forbid, only, from_1 = codes_shown(text)
        assert at[:3] == [*free[:2], 5] and rest[:2] == free[:2] and rest[2] != 5
        assert set(force) == {3} and freed == free
        assert (listed[0], listed[2]) == (1, 6)
        assert not set(forbid) & {1, 6} and set(only) <= {2, 4, 5} and set(from_1) <= {2, 4, 5}
        assert "steered: " in text and "policy: " in text and "success" in text

    def test_other_commands_show(self, steerer):
        text, failed = talk(
            steerer,
            ":prompt",
            ":prompt 1",
            ":why 0",
            ":base",
            ":temperature 1.5",
            ":seed 3",
            ":tokens 2",
            ":greedy",
            ":help",
        )
        assert not failed
        assert Countdown().prompts("heldout")[1].text in text
        assert "token 0, now" in text and "base LM: " in text and ":quit" in text
        assert [len(codes) for codes in codes_shown(text)][-2:] == [2, 2]

    def test_what_is_wrong_is_said_and_the_session_goes_on(self, steerer):
        wrong = [
            ":at 1 3",
            PROMPT,
            ":at 99 1",
            ":at 1",
            ":at 1 x",
            ":nonsense",
            ":why",
            ":force",
            ":force 8",
            ":prompt 9999",
            ":tokens 5000",
        ]
        text, failed = talk(steerer, *wrong, ":again")
        assert failed == len(wrong) - 1
        errors = [line for line in text.splitlines() if line.startswith("error: ")]
        assert len(errors) == failed and all(len(line) < 200 for line in errors)
        before, after = codes_shown(text)[0], codes_shown(text)[-1]
        assert before == after

    def test_json_lines_lead_to_the_same_answer_again(self, steerer):
        text, _ = talk(steerer, PROMPT, ":at 1 4", ":quit", PROMPT, as_json=True)
        first, second = map(json.loads, text.splitlines())
        assert (first["by"], second["by"]) == ("policy", "steered")
        assert second["tokens"][1]["code"] == 4 and second["tokens"][1]["forced"]
        assert steerer.answer(SteeringRequest.model_validate(second["wish"])).text == second["text"]

    def test_lines_fit_the_width_and_hostile_texts_do_not_move_the_cursor(self, hostile_steerer):
        answer = hostile_steerer.answer(SteeringRequest(prompt=PROMPT))
        assert printable("\x1b[2J\u202ea\nb\x07") == "\ufffd[2J\ufffda\u23ceb\ufffd"
        assert not re.search(
            "[\x00-\x08\x0b-\x1f\x7f\u202e]", "\n".join(line.plain for line in answer_lines(answer, "steered", 80))
        )
        plain = answer_lines(steered_plainly(hostile_steerer), "steered", 40)
        assert max(len(line.plain) for line in plain[1:-1]) <= 40 and len(plain) > 6  # two blocks of columns

    def test_lists_of_codes(self):
        assert codes_of("3, 5,10-12", "x") == [3, 5, 10, 11, 12]
        assert codes_of("3,_,17", "x", gaps=True) == [3, None, 17]
        for wrong in ("3,_", "a", "3-", "-3", "1-9999999"):
            with pytest.raises(ValueError, match="is not a code"):
                codes_of(wrong, "x")


def steered_plainly(hostile: Steerer) -> Any:
    """An answer of the same model with its own words."""
    from dataclasses import replace

    tokenizer = hostile.loaded.tokenizer._tokenizer
    return Steerer(replace(hostile.loaded, tokenizer=tokenizer)).answer(
        SteeringRequest(prompt=PROMPT, max_tokens=12, temperature=1.0, seed=1)
    )


def command(*words: str, stdin: str | None = None) -> Any:
    return CliRunner().invoke(app, ["steer", *words], input=stdin)


class TestCommand:
    def test_one_answer_as_json(self, explored_run, steerer):
        done = command(
            str(explored_run),
            "--prompt",
            PROMPT,
            "--codes",
            "3,_,6",
            "--forbid",
            "1,2",
            "--why",
            "1",
            "--base-answer",
            "--json",
        )
        assert done.exit_code == 0, done.output
        found = json.loads(done.stdout)
        wish = SteeringRequest(prompt=PROMPT, codes=[3, None, 6], forbidden_codes=[1, 2])
        assert [token["code"] for token in found["tokens"]] == [token.code for token in steerer.answer(wish).tokens]
        assert found["text"] == steerer.answer(wish).text and found["wish"] == wish.model_dump(mode="json")
        assert (
            found["candidates"]["chosen"] == found["tokens"][1]["code"]
            and found["base"]["text"] == steerer.base(wish).text
        )

    def test_lines_from_a_pipe(self, explored_run):
        done = command(str(explored_run), stdin=f"{PROMPT}\n:at 1 4\n")
        assert done.exit_code == 0, done.output
        assert codes_shown(done.stdout)[1][1] == 4
        assert command(str(explored_run), "--terminal", stdin=f"{PROMPT}\n:at 1 99\n").exit_code == 1

    @pytest.mark.parametrize(
        ("words", "said"),
        [
            (["--prompt", "3", "--codes", "3,x"], "'x' is not a code"),
            (["--prompt", "3", "--port", "8081"], "leave out one"),
            (["--prompt", "3", "--terminal"], "leave out one"),
            (["--prompt", "3", "--greedy", "--temperature", "1"], "contradict"),
            (["--why", "3", "--terminal"], "go with --prompt"),
            (["--web", "--codes", "3"], "chosen on the page itself"),
            (["--prompt", "3", "--device", "tpu"], "give cpu or cuda"),
        ],
    )
    def test_contradictions_are_said_before_anything_is_loaded(self, tmp_path, words, said):
        done = command(str(tmp_path), *words)
        assert done.exit_code == 2 and said in " ".join(done.stderr.split()), done.output

    def test_wrong_targets_and_codes(self, explored_run, tmp_path):
        for words, said in (
            ([str(tmp_path / "nowhere"), "--prompt", "3"], "nowhere"),
            ([str(tmp_path), "--prompt", "3"], "neither a run folder nor"),
            ([str(explored_run), "--prompt", PROMPT, "--codes", "8"], "the model's codes are 0 to 7"),
            ([str(explored_run), "--prompt", PROMPT, "--why", "77"], "the answer has tokens 0 to"),
        ):
            done = command(*words)
            assert done.exit_code == 2 and said in " ".join(done.stderr.split()), done.output

    def test_a_taken_port_is_said_or_passed_by(self):
        with socket.create_server(("127.0.0.1", 0)) as other:
            port = other.getsockname()[1]
            with pytest.raises(ValueError, match=f"port {port} is taken"):
                listen("127.0.0.1", port)
        with listen("127.0.0.1", None) as first, listen("127.0.0.1", None) as second:
            assert 8080 <= first.getsockname()[1] < second.getsockname()[1]
        with pytest.raises(ValueError, match="give another --host"):
            listen("203.0.113.7", 8080)
        assert is_loopback("127.0.0.1") and is_loopback("::1") and is_loopback("localhost")
        assert not is_loopback("0.0.0.0") and not is_loopback("example.org")

    @pytest.mark.slow
    def test_the_page_is_served_until_sigterm(self, explored_run):
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        words = [sys.executable, "-m", "pipeline", "steer", str(explored_run), "--web"]
        with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment) as process:
            assert process.stdout is not None
            line = next(line for line in process.stdout if line.startswith("steering page"))
            assert "reached from this machine only" in line
            with urllib.request.urlopen(line.split()[2], timeout=30) as reply:
                assert b"Steering" in reply.read()
            process.send_signal(signal.SIGTERM)
            assert process.stdout.read().endswith("stopped\n")
        assert process.returncode == 0


def send(address: str, path: str, body: Any = None, method: str | None = None, **headers: str) -> tuple[int, Any, Any]:
    """(status, what came back, headers)."""
    data = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    given = {name.replace("_", "-"): value for name, value in ({"content_type": "application/json"} | headers).items()}
    request = urllib.request.Request(address + path, data, given, method=method)
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:
            text = reply.read().decode()
            return reply.status, json.loads(text) if "/api/" in path else text, reply.headers
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read()), error.headers


class TestService:
    def test_it_answers_what_the_steerer_says(self, page_address, steerer):
        wish = {"prompt": PROMPT, "codes": [None, 4], "forbidden_at": {"3": [1]}}
        status, found, headers = send(page_address, "/api/answer", wish)
        assert status == 200 and found["text"] == steerer.answer(SteeringRequest.model_validate(wish)).text
        assert [token["forced"] for token in found["tokens"]][:2] == [False, True]
        assert headers["cross-origin-resource-policy"] == "same-origin" and "access-control-allow-origin" not in headers
        status, rows, _ = send(page_address, "/api/candidates", wish | {"place": 1})
        assert status == 200 and rows["chosen"] == 4 and len(rows["codes"]) == 8
        assert (
            send(page_address, "/api/base", {"prompt": PROMPT})[1]["text"]
            == steerer.base(SteeringRequest(prompt=PROMPT)).text
        )
        about = send(page_address, "/api/model")[1]
        assert (about["num_codes"], about["task"], about["prompts"][0]) == (8, "countdown", PROMPT)

    def test_the_page_may_load_nothing_from_elsewhere(self, page_address):
        status, text, headers = send(page_address, "/")
        rules = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)[1]
        assert status == 200 and rules.startswith("default-src 'none'") and "unsafe" not in rules
        assert headers["content-security-policy"] == "frame-ancestors 'none'"
        assert not re.search(r"""(src|href)=["']?(https?:)?//""", text)

    @pytest.mark.parametrize(
        ("headers", "status"),
        [
            ({"Host": "evil.example"}, 403),
            ({"Host": "evil.example:8080"}, 403),
            ({"Host": "203.0.113.9:8080"}, 403),
            ({"Host": "127.0.0.1.evil.example"}, 403),
            ({"Origin": "http://evil.example"}, 403),
            ({"Origin": "null"}, 403),
            ({"Sec_Fetch_Site": "cross-site"}, 403),
            ({"content_type": "text/plain"}, 415),
            ({"content_type": "application/x-www-form-urlencoded"}, 415),
        ],
    )
    def test_other_pages_and_other_names_are_turned_away(self, page_address, headers, status):
        found, body, _ = send(page_address, "/api/answer", {"prompt": PROMPT}, **headers)
        assert found == status and body["error"]["message"]

    def test_who_does_not_know_the_token_is_turned_away(self, page_address):
        place = urlsplit(page_address)
        service, token = f"http://{place.netloc}", place.path.removeprefix("/")
        assert len(token) >= 20
        for path in ("/", "/api/model", f"/{token[:-1]}/api/model", f"/{token}x/api/model", f"/{token}", "//api/model"):
            assert send(service, path)[0] == 403, path
        assert send(service, "/api/answer", {"prompt": PROMPT})[0] == 403
        assert send(service, f"/{token}/api/model")[0] == 200

    def test_its_own_names_are_let_in(self, page_address):
        port = urlsplit(page_address).port
        for host in (f"localhost:{port}", f"[::1]:{port}", f"127.0.0.1:{port}"):
            assert send(page_address, "/api/model", Host=host)[0] == 200
            assert send(page_address, "/api/answer", {"prompt": PROMPT}, Host=host, Origin=f"http://{host}")[0] == 200
        assert names_of("0.0.0.0") >= {"localhost", socket.gethostname().lower()}

    @pytest.mark.parametrize(
        ("body", "status", "said"),
        [
            (b"{", 400, "not JSON"),
            (b"[]", 400, "object"),
            ({"prompt": 3}, 400, "prompt"),
            ({"prompt": PROMPT, "code": [3]}, 400, "known are"),
            ({"prompt": PROMPT, "codes": [99]}, 400, "0 to 7"),
            ({"prompt": PROMPT, "max_tokens": 10**6}, 400, "max_tokens"),
            ({"prompt": "3 " * 20_000}, 400, "prompt"),
            (b" " * (LARGEST_BODY + 1), 413, "at most"),
        ],
    )
    def test_what_is_wrong_with_a_question_is_said(self, page_address, body, status, said):
        found, reply, _ = send(page_address, "/api/answer", body)
        assert found == status and said in reply["error"]["message"]

    def test_a_body_of_unknown_size_is_not_read(self, page_address):
        place = urlsplit(page_address)
        connection = http.client.HTTPConnection(place.netloc, timeout=30)
        connection.request(
            "POST",
            f"{place.path}/api/answer",
            iter([b"{}"]),
            {"content-type": "application/json"},
            encode_chunked=True,
        )
        assert connection.getresponse().status == 411
        connection.close()

    def test_there_is_nothing_else(self, page_address):
        for path in ("/docs", "/openapi.json", "/redoc", "/api/nothing"):
            assert send(page_address, path)[0] in (404, 405)  # 405: questions are posted, whatever their name


def test_help_names_the_modes():
    text = re.sub(r"\s+", " ", CliRunner().invoke(app, ["steer", "--help"]).output)
    assert "--terminal" in text and "--prompt" in text and "--host" in text

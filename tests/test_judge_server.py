"""A real judge over a real OpenAI-compatible server: SmolLM2-135M, too weak to be believed. Run with `-m slow`."""

import pytest
from test_judge import no_bar, settings
from test_teach_server import server  # noqa: F401  the fixture

from minigad.judge import PAIRWISE, RATING, judge, own_completions
from minigad.store import Store
from minigad.teacher import OpenAITeacher, Sampling

PROMPTS = ["Name a fruit.", "Say hello."]
OURS, THEIRS = ["An apple.", "Hello!"], ["Rain falls.", "No."]


@pytest.mark.slow
def test_a_weak_judge_is_read_or_counted_and_asked_once(server, tmp_path):  # noqa: F811
    """Every place has points or is counted as malformed, nothing is lost, and a second judging makes no call."""
    url, model, log = server
    weak = OpenAITeacher(model, url, timeout=900.0)
    few = settings(sampling=Sampling(1.0, 16), redraws=1)
    with Store(tmp_path / "judge.db") as store:
        for again in (False, True):
            served = log.read_text().count("POST /v1/chat/completions")
            own = own_completions(weak, PROMPTS, store, few, no_bar).texts
            assert all(own)
            for protocol, others in ((RATING, own), (PAIRWISE, THEIRS)):
                verdicts = judge(weak, protocol, PROMPTS, OURS, others, store, few, no_bar)
                print(protocol.name, verdicts.shares.tolist(), verdicts.replies, verdicts.malformed)
                assert int((verdicts.shares == verdicts.shares).sum()) + verdicts.malformed == verdicts.shares.size
                assert verdicts.replies == verdicts.shares.size + verdicts.asked_again
                assert verdicts.asked_again >= verdicts.malformed, "what cannot be read is asked for once more first"
                assert verdicts.summary.progress.found == (4 if again else 0)
            assert again == (log.read_text().count("POST /v1/chat/completions") == served)
    weak.close()

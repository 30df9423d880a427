"""The discriminators that benchmarks/beyond.py tries do what their names say."""

import sys
from pathlib import Path

import pytest
import torch

from minigad.config import PRESETS
from minigad.discriminator import Discriminator
from minigad.student import Student
from minigad.toy.letters import letters_tokenizer

CONFIG = PRESETS["toy"].replace(max_completion_length=12)


@pytest.fixture
def beyond(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    import beyond

    yield beyond
    for name in ("beyond", "frontier", "results", "toy_letters", "variants"):
        sys.modules.pop(name, None)


@pytest.fixture
def student():
    return Student.load(CONFIG, tokenizer=letters_tokenizer())


def rows_of(discriminator, texts=("abc.", "c,b,a!", "cab.", "abc!")):
    """Two prompts: the teacher's two texts first, then a text of the student's for each."""
    return discriminator.encode(["abc", "abc", "abc", "abc"], texts, [True] * len(texts))


def loss(discriminator, rows):
    scores = discriminator.score(rows)
    return discriminator.loss(scores.take(slice(0, 2)), scores.take(slice(2, None)))


def large(seed, student):
    return Discriminator.load(CONFIG.replace(seed=seed), student).language_model


def test_replay_halves_the_loss_between_this_step_and_an_earlier(beyond, student):
    plain, replay = Discriminator(large(1, student), student, CONFIG), beyond.Replay(large(1, student), student, CONFIG)
    first, second = rows_of(plain), rows_of(plain, ("a,b.", "ccc!", "b", "aabb."))
    one, two = loss(plain, first).item(), loss(plain, second).item()
    assert loss(replay, first).item() == pytest.approx(one)  # nothing else is past yet
    found = {round(loss(replay, second).item(), 5) for _ in range(12)}
    assert {round(two, 5), round((one + two) / 2, 5)} <= found
    with torch.no_grad():
        assert loss(replay, second).item() == pytest.approx(two)


def test_the_penalty_is_the_squared_slope_of_the_teachers_scores(beyond, student):
    """Against finite differences of every coordinate of every embedding, all in one batch."""
    model, weight = large(1, student), 0.3
    plain, judge = Discriminator(model, student, CONFIG), beyond.Penalised(model, student, CONFIG, weight)
    rows = rows_of(judge)
    added = (loss(judge, rows) - loss(plain, rows)).item()
    width, total = judge.embedded[0].shape[2], 0.0
    for row in rows[:2]:
        many = row.length * width
        moved = 1e-2 * torch.eye(many).view(many, row.length, width)
        up, down = (_moved(plain, model, [row] * many, sign * moved) for sign in (1, -1))
        total += ((up - down) / 2e-2).pow(2).sum().item()
    assert added == pytest.approx(weight * total / 2, rel=1e-2)
    loss(judge, rows).backward()  # differentiable a second time
    grads = [p.grad for p in judge.parameters() if p.grad is not None]
    assert grads
    assert all(grad.isfinite().all() for grad in grads)


def _moved(judge, model, rows, by):
    """Scores with something added to the discriminator's embeddings."""
    hook = model.model.get_input_embeddings().register_forward_hook(lambda _module, _inputs, output: output + by)
    with torch.no_grad():
        scores = judge.score(rows).scores
    hook.remove()
    return scores


def test_an_ensemble_scores_by_the_mean_and_each_member_learns_by_itself(beyond, student):
    members = [Discriminator(large(seed, student), student, CONFIG) for seed in (1, 2, 3)]
    others = [large(seed, student) for seed in (2, 3)]
    ensemble = beyond.Ensemble(large(1, student), student, CONFIG, others)
    rows = rows_of(ensemble)
    with torch.no_grad():
        mean = torch.stack([member.score(rows).scores for member in members]).mean(0)
        torch.testing.assert_close(ensemble.score(rows).scores, mean)
        torch.testing.assert_close(ensemble.score(rows).token_rewards().sum(1), mean)
    loss(ensemble, rows).backward()
    for member in members:
        loss(member, rows).backward()
    alone = [p.grad for member in members for p in member.parameters()]
    for together, apart in zip(ensemble.parameters(), alone, strict=True):
        torch.testing.assert_close(together.grad, apart)


def test_a_terminal_reward_is_the_whole_score_on_the_last_token(beyond, student):
    judge = beyond.Terminal(large(1, student), student, CONFIG)
    scores = judge.score(rows_of(judge))
    rewards, last = scores.token_rewards(), scores.mask.sum(1) - 1
    torch.testing.assert_close(rewards.gather(1, last[:, None]).squeeze(1), scores.scores)
    assert (rewards != 0).sum() == len(rewards)

"""The loop on the toy: order, isolation of the players, parity of the two sides' text, reproducibility."""

import copy
import math

import pytest
import torch

from minigad import model as model_module
from minigad.chat import Row, decode, encode, encode_prompt
from minigad.config import PRESETS, UserError
from minigad.discriminator import Discriminator
from minigad.model import LanguageModel, completion_mask, split_rows
from minigad.rollout import Rollouts, generate
from minigad.student import Student
from minigad.toy.letters import LettersTeacher, letters_dataset, letters_metrics, letters_prompts, letters_tokenizer
from minigad.toy.model import toy_tokenizer
from minigad.train import discriminator_step, gad, seqkd, soda, student_step, warmup

KINDS = ("sequence", "prefix", "implicit")
CONFIG = PRESETS["toy"].replace(
    max_completion_length=16,
    warmup_epochs=0.5,
    warmup_batch_size=32,
    discriminator_sft_epochs=0.25,
    discriminator_warmup_steps=2,
    max_steps=3,
    per_device_train_batch_size=4,
    num_generations=4,
    beta=0.01,
    seqkd_epochs=0.5,
    dpo_epochs=0.25,
)


@pytest.fixture(scope="module")
def data():
    return letters_dataset(256, 0)


def make_student(config=CONFIG, **lora):
    return Student.load(config.replace(**lora), tokenizer=letters_tokenizer())


def weights(model: LanguageModel) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters().values()]


def same(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def first_batch(data, size=4):
    return data["prompt"][:size], data["completion"][:size]


# --- ids, masks, log-probabilities ---


def test_a_finished_completion_ends_with_one_end_token_on_both_sides():
    """Trap 1: text that came back from the student's ids is encoded as the teacher's text is."""
    tokenizer = letters_tokenizer()
    teacher = encode(tokenizer, "abc", "c,b,a.")
    text, finished = decode(tokenizer, teacher.completion_ids)
    assert (text, finished) == ("c,b,a.", True)
    assert encode(tokenizer, "abc", text, finished=finished) == teacher
    assert teacher.completion_ids.count(tokenizer.eos_token_id) == 1
    cut = encode(tokenizer, "abc", "c,b,a.", max_completion_length=3)
    assert tokenizer.eos_token_id not in cut.completion_ids
    assert len(cut.completion_ids) == 3


def test_control_tokens_written_in_a_prompt_stay_text():
    tokenizer = toy_tokenizer()
    ids = encode_prompt(tokenizer, "a<|end|>b<|assistant|>")
    assert tokenizer.eos_token_id not in ids
    assert ids.count(tokenizer.convert_tokens_to_ids("<|assistant|>")) == 1  # the template's own
    assert "a<|end|>b<|assistant|>" in tokenizer.decode(ids)


def test_conversation_without_a_chat_template_is_refused_in_one_sentence():
    tokenizer = toy_tokenizer()
    tokenizer.chat_template = None
    assert encode_prompt(tokenizer, "ab") == tokenizer("ab").input_ids
    with pytest.raises(UserError, match="no chat template"):
        encode_prompt(tokenizer, [{"role": "user", "content": "ab"}])


def test_logprobs_are_those_of_the_full_model():
    """Backbone, gathered positions and chunks give what the whole model's logits give, whatever the padding."""
    student = make_student()
    tokenizer = student.tokenizer
    rows = [encode(tokenizer, "abc", "a."), encode(tokenizer, "abcde", "e,d,c,b,a!"), encode(tokenizer, "ab", "")]
    got = student.logprobs_of(rows, 0.7)
    for row, values in zip(rows, got, strict=True):
        with torch.no_grad():
            logits = student.model(torch.tensor([row.prompt_ids + row.completion_ids])).logits[0] / 0.7
        expected = [
            torch.log_softmax(logits[len(row.prompt_ids) + t - 1], -1)[token]
            for t, token in enumerate(row.completion_ids)
        ]
        torch.testing.assert_close(values[: len(expected)], torch.stack(expected), atol=1e-5, rtol=1e-5)
        assert bool((values[len(expected) :] == 0).all())


@pytest.mark.parametrize("kind", ["sequence", "prefix", "implicit"])
def test_the_lm_head_reads_completion_tokens_in_chunks_and_a_head_of_scores_needs_none_of_it(kind, data, monkeypatch):
    """Trap 16: logits of every token and row at once would be gigabytes."""
    monkeypatch.setattr(model_module, "LOGITS_CHUNK", 16)
    config = CONFIG.replace(discriminator=kind, discriminator_model="", token_budget=10_000)
    student = make_student(config)
    discriminator, rows = Discriminator.load(config, student), []
    student.freeze_reference()
    players = {"student": student, "reference": student.reference, "discriminator": discriminator.language_model}
    for name, player in players.items():
        head = player.model.get_output_embeddings()
        head.register_forward_hook(lambda _m, inputs, _o, name=name: rows.append((name, inputs[0].shape)))
    prompts, completions = first_batch(data)
    rollouts = student.generate(prompts, config, seed=0, num_generations=4)
    rows.clear()
    discriminator_step(discriminator, None, rollouts, completions)
    assert any(name == "discriminator" for name, _ in rows) == (kind == "implicit")
    assert all(shape[0] <= 16 and len(shape) == 2 for _, shape in rows)
    rows.clear()
    student.logprobs_of(rollouts.rows, token_budget=10_000)
    assert sum(shape[0] for _, shape in rows) == sum(len(row.completion_ids) for row in rollouts.rows)
    assert max(shape[0] for _, shape in rows) == 16


def test_mask_counts_the_end_token_even_where_pad_equals_it():
    rows = [Row((1,), (5, 2)), Row((1,), (5, 6, 7))]
    assert completion_mask(rows).tolist() == [[True, True, False], [True, True, True]]


def test_split_rows_covers_every_row_within_the_budget():
    lengths = [3, 9, 4, 4, 30, 1]
    chunks = split_rows(lengths, 12)
    assert sorted(i for chunk in chunks for i in chunk) == list(range(len(lengths)))
    assert all(len(chunk) == 1 or len(chunk) * max(lengths[i] for i in chunk) <= 12 for chunk in chunks)


def test_sampling_follows_the_models_own_distribution_and_ignores_its_generation_settings():
    """Trap 7: first tokens are drawn with the softmax's frequencies although the model asks for top-k 1."""
    student = make_student()
    student.model.generation_config.top_k = 1
    student.model.generation_config.do_sample = True
    n = 4000
    rollouts = generate(student, ["abc"], num_generations=n, max_completion_length=1, seed=0)
    counts = torch.bincount(torch.tensor([row.completion_ids[0] for row in rollouts.rows]), minlength=16) / n
    vocabulary = [Row(tuple(encode_prompt(student.tokenizer, "abc")), (token,)) for token in range(16)]
    probs = student.logprobs_of(vocabulary)[:, 0].exp()
    assert (counts - probs).abs().max() < 5 * math.sqrt(0.25 / n)


def test_rollouts_depend_on_the_seed_alone_and_group_by_index():
    student = make_student()
    torch.manual_seed(1)
    a = generate(student, ["abc", "abc"], num_generations=3, max_completion_length=8, seed=5)
    torch.manual_seed(2)
    b = generate(student, ["abc", "abc"], num_generations=3, max_completion_length=8, seed=5)
    assert a.rows == b.rows
    assert len(a.rows) == 6  # two groups, although the prompts are equal


# --- discriminators ---


@pytest.mark.parametrize("kind", KINDS)
def test_token_rewards_sum_to_the_score(kind, data):
    config = CONFIG.replace(discriminator=kind)
    student = make_student(config)
    discriminator = Discriminator.load(config, student)
    if discriminator.head is not None:
        torch.nn.init.normal_(discriminator.head.weight)
    rows = discriminator.encode(*first_batch(data), [True] * 4)
    with torch.no_grad(), discriminator.language_model.active(train=False):
        scores = discriminator.score(rows)
    assert scores.scores.abs().max() > 0
    torch.testing.assert_close(scores.token_rewards().sum(1), scores.scores, atol=1e-4, rtol=1e-4)


def test_head_reads_the_last_real_token_whatever_the_padding(data):
    """Trap 3: a row alone and the same row beside a longer one have one score."""
    discriminator = Discriminator.load(CONFIG.replace(discriminator="sequence"), make_student())
    torch.nn.init.normal_(discriminator.head.weight)
    rows = discriminator.encode(["abc", "abcde"], ["a.", "e,d,c,b,a."], [True, True])
    with torch.no_grad(), discriminator.language_model.active(train=False):
        together, alone = discriminator.score(rows).scores[0], discriminator.score(rows[:1]).scores[0]
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_identical_text_has_one_score_on_either_side(kind, data):
    config = CONFIG.replace(discriminator=kind)
    student = make_student(config)
    discriminator = Discriminator.load(config, student)
    optimizer = torch.optim.AdamW(discriminator.parameters(), lr=1e-2)
    prompts, completions = first_batch(data)
    rows = [encode(student.tokenizer, p, c) for p, c in zip(prompts, completions, strict=True) for _ in range(2)]
    decoded = [decode(student.tokenizer, row.completion_ids) for row in rows]
    rollouts = Rollouts(prompts, rows, [t for t, _ in decoded], [f for _, f in decoded], 2)
    for _ in range(2):
        rewards, metrics = discriminator_step(discriminator, optimizer, rollouts, completions)
    assert metrics["discriminator/identical_pairs"] == 1.0
    assert metrics["discriminator/identical_text_gap"] < 1e-5
    assert metrics["discriminator/loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert metrics["discriminator/margin"] == pytest.approx(0, abs=1e-5)  # an accuracy here is decided by rounding


def test_rewards_go_to_the_last_token_where_the_sampled_ids_are_not_the_texts_own(data):
    """A reward is never given to a token that the discriminator did not see there."""
    config = CONFIG.replace(discriminator="implicit")
    student = make_student(config)
    discriminator = Discriminator.load(config, student)
    odd = student.tokenizer.convert_tokens_to_ids("<|user|>")
    rows = [encode(student.tokenizer, "abc", "a."), Row(tuple(encode_prompt(student.tokenizer, "abc")), (0, odd, 1))]
    decoded = [decode(student.tokenizer, row.completion_ids) for row in rows]
    rollouts = Rollouts(["abc"], rows, [t for t, _ in decoded], [f for _, f in decoded], 2)
    rewards, metrics = discriminator_step(discriminator, None, rollouts, ["c,b,a."])
    assert metrics["frac_retokenized"] == 0.5
    assert (rewards[0] != 0).sum() == 3
    assert rewards[1, :2].tolist() == [0.0, 0.0]
    assert rewards[1, 2] != 0


# --- the players do not touch each other ---


@pytest.mark.parametrize("lora_r", [0, 4])
@pytest.mark.parametrize("own_model", ["toy-large", ""])
def test_each_update_moves_one_player_only(lora_r, own_model, data):
    config = CONFIG.replace(lora_r=lora_r, discriminator_model=own_model, discriminator="sequence")
    student = make_student(config)
    discriminator = Discriminator.load(config, student)
    reference = student.freeze_reference()
    before = weights(student), weights(discriminator.language_model), weights(reference)
    rollouts = student.generate(data["prompt"][:4], config, seed=0, num_generations=4)
    judge = torch.optim.AdamW(discriminator.parameters(), lr=1e-2)
    for _ in range(2):  # the head starts at zero: the second step is the first that reaches the backbone
        rewards, _ = discriminator_step(discriminator, judge, rollouts, data["completion"][:4])
    assert same(weights(student), before[0])
    assert not same(weights(discriminator.language_model), before[1])
    moved = weights(discriminator.language_model)
    player = torch.optim.AdamW(list(student.parameters().values()), lr=1e-2)
    student_step(student, player, rollouts.rows, rewards + torch.randn_like(rewards), config)
    assert not same(weights(student), before[0])
    assert same(weights(discriminator.language_model), moved)
    assert same(weights(reference), before[2])


def test_active_restores_adapter_mode_and_grad_flags_even_after_an_error():
    student = make_student(CONFIG, lora_r=4)
    student.freeze_reference()
    flags = [p.requires_grad for p in student.model.parameters()]
    modes = [m.training for m in student.model.modules()]
    with pytest.raises(RuntimeError, match="on purpose"), student.reference.active(train=True):
        assert all(m.training for m in student.model.modules())
        raise RuntimeError("on purpose")
    assert student.model.active_adapter == "student"
    assert [p.requires_grad for p in student.model.parameters()] == flags
    assert [m.training for m in student.model.modules()] == modes


def test_reference_is_the_warmed_up_student_not_the_base(data):
    """Trap 10."""
    config = CONFIG.replace(lora_r=4, discriminator_model="", discriminator="sequence", warmup_learning_rate=1e-2)
    student = make_student(config)
    discriminator = Discriminator.load(config, student)
    for _ in warmup(student, discriminator, data, config):
        pass
    rows = [encode(student.tokenizer, "abc", "c,b,a.")]
    torch.testing.assert_close(student.reference.logprobs_of(rows), student.logprobs_of(rows))
    with student.model.disable_adapter():
        base = LanguageModel(student.model.get_base_model(), student.tokenizer).logprobs_of(rows)
    assert (base - student.logprobs_of(rows)).abs().max() > 1e-3


# --- steps ---


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("token_budget", [1, 200])
def test_a_step_does_not_depend_on_how_it_is_split(kind, token_budget, data):
    """Trap 6: gradients of both players are equal for one chunk, a few, or a chunk a row."""

    def play(budget: int):
        config = CONFIG.replace(discriminator=kind, token_budget=budget, max_steps=2, sft_weight=0.1)
        student = make_student(config)
        discriminator = Discriminator.load(config, student)
        student.freeze_reference()
        rollouts = make_student().generate(data["prompt"][:4], CONFIG, seed=0, num_generations=4)
        judge = torch.optim.SGD(discriminator.parameters(), lr=0.5)
        player = torch.optim.SGD(list(student.parameters().values()), lr=0.5)
        for _ in range(2):
            rewards, _ = discriminator_step(discriminator, judge, rollouts, data["completion"][:4])
            teacher = discriminator.encode(*first_batch(data), [True] * 4)
            student_step(student, player, rollouts.rows, rewards, config, teacher)
        return weights(student) + weights(discriminator.language_model)

    for whole, split in zip(play(1 << 20), play(token_budget), strict=True):
        torch.testing.assert_close(whole, split, atol=1e-5, rtol=1e-4)


def test_one_seed_gives_one_history_and_another_seed_another(data):
    def history(seed: int):
        config = CONFIG.replace(seed=seed)
        student = make_student(config)
        discriminator = Discriminator.load(config, student)
        steps = [*warmup(student, discriminator, data, config), *gad(student, discriminator, data, config)]
        return [step.get("reward", step.get("loss")) for step in steps]

    assert history(0) == history(0)
    assert history(0) != history(1)


def test_a_frozen_discriminator_does_not_move(data):
    config = CONFIG.replace(freeze_discriminator=True, discriminator="sequence")
    student = make_student(config)
    discriminator = Discriminator.load(config, student)
    before = weights(discriminator.language_model)
    steps = list(gad(student, discriminator, data, config))
    assert same(weights(discriminator.language_model), before)
    assert "discriminator/grad_norm" not in steps[0]


def test_metrics_have_the_conventions_names(data):
    config = CONFIG.replace(eval_steps=1)
    student = make_student(config)
    steps = list(gad(student, Discriminator.load(config, student), data, config, data))
    expected = {"reward", "reward_std", "frac_reward_zero_std", "kl", "entropy", "step_time", "num_tokens"}
    expected |= {f"completions/{name}" for name in ("mean_length", "min_length", "max_length", "clipped_ratio")}
    names = ("loss", "accuracy", "accuracy_eval", "margin", "length_corr", "identical_text_gap", "grad_norm")
    expected |= {f"discriminator/{name}" for name in names}
    assert expected <= set(steps[0])
    assert [step["step"] for step in steps] == [1, 2, 3]
    assert {step["nll_eval"] for step in steps} != {steps[0]["nll_eval"]}  # the student moves, and so does the batch
    assert steps[0]["kl"] == pytest.approx(0, abs=1e-6)  # the student still is its reference


def test_the_rate_decays_and_the_average_lags(data):
    config = CONFIG.replace(lr_final_fraction=0.1, ema_decay=0.99)
    student, plain = make_student(config), make_student(config)
    start = weights(student)
    steps = list(gad(student, Discriminator.load(config, student), data, config))
    assert steps[-1]["learning_rate"] == pytest.approx(0.1 * config.learning_rate)
    list(gad(plain, Discriminator.load(config, plain), data, config.replace(ema_decay=0.0)))

    def distance(model):
        return sum(((a - b) ** 2).sum() for a, b in zip(weights(model), start, strict=True)).sqrt()

    assert 0 < distance(student) < 0.1 * distance(plain)


@pytest.mark.parametrize("baseline", [seqkd, soda])
def test_baselines_lower_the_teachers_nll(baseline, data):
    student = make_student()
    rows = [encode(student.tokenizer, p, c) for p, c in zip(data["prompt"], data["completion"], strict=True)]
    before = student.logprobs_of(rows).sum()
    steps = list(baseline(student, data, CONFIG.replace(dpo_learning_rate=1e-4)))
    assert student.logprobs_of(rows).sum() > before + 100
    assert all(math.isfinite(step["loss"]) for step in steps)


def test_a_gradient_that_is_not_finite_stops_the_run(data):
    student = make_student()
    with torch.no_grad():
        next(iter(student.parameters().values())).fill_(float("nan"))
    kept = copy.deepcopy(weights(student)[1:])
    with pytest.raises(FloatingPointError, match="nothing was updated"):
        list(seqkd(student, data, CONFIG))
    assert same(weights(student)[1:], kept)


# --- the letters language ---


def test_the_teacher_is_a_distribution():
    """Its valid strings sum to one, and a noise text has the probability that the formula gives."""
    teacher = LettersTeacher()
    for prompt in ("abc", "cab", "hgfed"):
        assert sum(teacher.valid(prompt).values()) == pytest.approx(1)
    assert len(teacher.valid("cadb")) == 16
    assert len(teacher.valid("abc")) == 8  # as given is ascending, reversed is descending
    assert teacher.logprob("abc", "z", True) == pytest.approx(math.log(0.001 * 12.0**-2))


def test_splits_share_no_prompt():
    splits = [set(letters_prompts(name)) for name in ("train", "validation", "heldout", "out-of-domain")]
    assert len(set.union(*splits)) == sum(map(len, splits))
    assert sum(map(len, splits[:3])) == 8736


def test_exact_validity_agrees_with_the_share_of_valid_samples(data):
    config = CONFIG.replace(seqkd_epochs=8.0, seqkd_learning_rate=1e-2)
    student = make_student(config)
    list(seqkd(student, letters_dataset(2000, 0, styles=(2,)), config))
    metrics = letters_metrics(student, config, "validation", 0.8, samples=2)
    teacher, prompts = LettersTeacher(), letters_prompts("validation")
    rollouts = student.generate(prompts, config, seed=3, num_generations=8, temperature=0.8)
    valid = [rollouts.finished[i] and text in teacher.valid(prompts[i // 8]) for i, text in enumerate(rollouts.texts)]
    assert metrics["validity"] == pytest.approx(sum(valid) / len(valid), abs=0.04)

"""Three discriminators behind one interface: a score for a completion, and rewards for its tokens.

sequence  the paper's: a linear head on the last token's hidden state. All reward is on the last token.
prefix    the same head at every token; a token's reward is the change of the score, so rewards sum to the score.
implicit  no head: score = scale · (log p_φ(y|x) - log p_ref(y|x)) of a language model p_φ; dense rewards for free.
          The Bradley-Terry optimum *is* such a log-ratio (see losses.bradley_terry_loss), so p_φ models the teacher.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minigad import __version__, hub, parallel
from minigad.chat import Prompt, Row, cut, encode, prompt_text
from minigad.config import GADConfig, UserError
from minigad.losses import bradley_terry_loss, prefix_bradley_terry_loss
from minigad.memory import with_room
from minigad.model import Encoder, LanguageModel, split_rows
from minigad.student import Student, load_language_model
from minigad.toy.model import TOY_SIZES

__all__ = ["Discriminator", "Scores"]

RECORD, WEIGHTS = "discriminator.json", "discriminator.safetensors"


class Scores(NamedTuple):
    """scores (R,) of whole completions; prefix_scores (R, T) after each token, or None; mask (R, T)."""

    scores: Tensor
    prefix_scores: Tensor | None
    mask: Tensor

    def detach(self) -> Scores:
        """Return the same numbers without their graph."""
        return Scores(
            self.scores.detach(), None if self.prefix_scores is None else self.prefix_scores.detach(), self.mask
        )

    def take(self, rows: slice) -> Scores:
        """Return some of the rows."""
        prefix = None if self.prefix_scores is None else self.prefix_scores[rows]
        return Scores(self.scores[rows], prefix, self.mask[rows])

    def token_rewards(self) -> Tensor:
        """Return rewards (R, T) that sum to the score of each row: changes of the prefix score, or all on the last token."""
        if self.prefix_scores is None:
            return last_token(self.scores, self.mask)
        before = F.pad(self.prefix_scores, (1, 0))[:, :-1]
        return (self.prefix_scores - before) * self.mask


def last_token(scores: Tensor, mask: Tensor) -> Tensor:
    """Put each row's score (R,) on its last completion token: (R, T), zero elsewhere."""
    out = torch.zeros(mask.shape, device=scores.device, dtype=scores.dtype)
    return out.scatter(1, mask.sum(1, keepdim=True).to(scores.device) - 1, scores.unsqueeze(1))


class Discriminator:
    """A language model of its own adapter or of its own weights, read as a judge of (prompt, completion)."""

    def __init__(self, language_model: LanguageModel, student: Student, config: GADConfig) -> None:
        self.language_model = language_model
        self.student = student
        self.config = config
        self.head: nn.Linear | None = None
        if isinstance(language_model, Encoder):
            _check_encoder(language_model, config)
        if config.discriminator == "implicit":
            _check_same_tokens(language_model, student)
        else:
            self.head = _zero_head(language_model)

    @classmethod
    def load(cls, config: GADConfig, student: Student) -> Discriminator:
        """Make the discriminator that `config` asks for: on the student's base, or a model of its own."""
        if not config.discriminator_model:
            return cls(student.spawn("discriminator"), student, config)
        tokenizer = student.tokenizer if config.student in ("toy", "toy-large") else None
        own = _load_own(config, tokenizer)
        return cls(own, student, config)

    @classmethod
    def from_pretrained(cls, folder: str | Path, student: Student) -> Discriminator:
        """Load what `save_pretrained` wrote, beside the student of the same run: the same texts have the same scores again.

        A base model is loaded by the name that the configuration has; a reference in the folder becomes the student's.
        Raises UserError if a file is missing or damaged, or if the weights do not fit the models.
        """
        folder = Path(folder)
        config, tensors = _read_saved(folder)
        made = cls.load(config, student)
        if any(name.startswith("reference/") for name in tensors):
            student.freeze_reference()
        mine = made.weights()
        wrong = mine.keys() ^ tensors.keys() or {name for name in mine if mine[name].shape != tensors[name].shape}
        if wrong:
            raise UserError(
                f"{folder / WEIGHTS} does not fit its models ({len(wrong)} tensors differ, such as {min(wrong)!r}); "
                "give the student of the same run, and the minigad and base model that made it"
            )
        with torch.no_grad():
            for name, tensor in mine.items():
                tensor.copy_(tensors[name])
        return made

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the weights that are its own as safetensors and the configuration as JSON; a shared or frozen base is not written.

        Not a model that others can load: `from_pretrained` needs the student too, which an implicit score compares with.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        # A clone: safetensors refuses tensors that share memory.
        tensors = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in self.weights().items()}
        (folder / WEIGHTS).write_bytes(safetensors.torch.save(tensors))
        record = {"minigad": __version__, "config": dataclasses.asdict(self.config)}
        (folder / RECORD).write_text(json.dumps(record, indent=1), encoding="utf-8")

    def weights(self) -> dict[str, Tensor]:
        """Return the live tensors that a score hangs on beside base and student: its own, and those of a reference it compares with."""
        named: dict[str, Tensor] = {f"model/{name}": p for name, p in self.language_model.parameters().items()}
        if self.head is not None:
            named["head"] = self.head.weight
        reference = self.student.reference
        if self.config.discriminator == "implicit" and self.config.discriminator_against == "reference" and reference:
            named |= {f"reference/{name}": p for name, p in reference.parameters().items()}
        return named

    def start_from_student(self) -> None:
        """Copy the student's weights, as the paper does before the game; only where both have the same shape."""
        assert not self.config.discriminator_model, self.config.discriminator_model
        self.language_model.copy_from(self.student)

    def parameters(self) -> list[nn.Parameter]:
        """Return the weights that its optimizer trains."""
        head = list(self.head.parameters()) if self.head is not None else []
        return [*self.language_model.parameters().values(), *head]

    def encode(self, prompts: Sequence[Prompt], texts: Sequence[str], finished: Sequence[bool]) -> list[Row]:
        """Turn texts into rows, with this discriminator's tokenizer; the only way in, for either side's text.

        Limits are those of the config, in this tokenizer's tokens; a model that reads text of its own gets twice the room.
        """
        tokenizer, room = self.language_model.tokenizer, 2 if self.config.discriminator_model else 1
        plain = [prompt if tokenizer.chat_template else prompt_text(prompt) for prompt in prompts]
        rows = [
            encode(
                tokenizer,
                prompt,
                text,
                finished=done
                or not text,  # a text of no tokens has no place for a score: saying nothing is to end at once
                max_prompt_length=room * self.config.max_prompt_length,
                max_completion_length=room * self.config.max_completion_length,
            )
            for prompt, text, done in zip(plain, texts, finished, strict=True)
        ]
        if not isinstance(self.language_model, Encoder):
            return rows
        return [Row((*row.prompt_ids, tokenizer.sep_token_id), row.completion_ids) for row in rows]

    def encode_teacher(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> list[Row]:
        """Turn teacher completions into rows, cut where the student's are: else length alone would give the sides away."""
        limit = self.config.max_completion_length
        said = [cut(self.student.tokenizer, completion, limit) for completion in completions]
        return self.encode(prompts, [text for text, _ in said], [done for _, done in said])

    def score(self, rows: Sequence[Row]) -> Scores:
        """Score rows, with gradients unless under no_grad. Call inside `language_model.active`, backward too.

        Rows beyond the token budget go in parts, each read again in the backward pass: a group of long completions costs the
        memory of one part and a second forward. A score is unbounded and has meaning only against another of the same prompt.
        """
        budget = self.language_model.within(self.config.token_budget)
        parts = split_rows([row.length for row in rows], budget)
        passes = [[rows[i] for i in part] for part, _ in parallel.in_step(parts)]
        if len(passes) == 1 or not torch.is_grad_enabled():
            return _in_order(parts, [self._score(some) for some in passes])
        return _in_order(parts, [checkpoint(self._score, some, use_reentrant=False) for some in passes])

    @torch.no_grad()
    def scores_of(self, rows: Sequence[Row]) -> Scores:
        """Score rows without gradients, in eval mode; makes its adapter the one in use, and puts the other back."""

        def scores() -> Scores:
            with self.language_model.active(train=False):
                return self.score(rows)

        return with_room("reference", self.language_model, self.config, scores)

    def _score(self, rows: Sequence[Row]) -> Scores:
        if self.config.discriminator == "implicit":
            ratios, mask = self._log_ratios(rows)
            prefix_scores = ratios.cumsum(1) * mask
            return Scores(ratios.sum(1), prefix_scores, mask)
        assert self.head is not None
        hidden, mask = self.language_model.completion_hidden(rows)
        every = self.head(hidden.float()).squeeze(-1)
        prefix_scores = torch.zeros(mask.shape, device=mask.device).masked_scatter(mask, every)
        scores = prefix_scores.gather(1, mask.sum(1, keepdim=True) - 1).squeeze(1)
        return Scores(scores, prefix_scores if self.config.discriminator == "prefix" else None, mask)

    def loss(self, teacher: Scores, student: Scores) -> Tensor:
        """Bradley-Terry loss of B teacher completions against B·N student completions, mean over pairs."""
        shape = (len(teacher.scores), -1)
        if self.config.discriminator == "prefix":
            assert teacher.prefix_scores is not None
            assert student.prefix_scores is not None
            time = (*shape, student.mask.shape[1])
            return prefix_bradley_terry_loss(
                teacher.prefix_scores, teacher.mask, student.prefix_scores.view(time), student.mask.view(time)
            )
        return bradley_terry_loss(teacher.scores, student.scores.view(shape))

    def _log_ratios(self, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
        """scale · (log p_φ - log p_ref) per token. p_ref is never trained here; p_φ is compared at temperature 1."""
        against = self.student if self.config.discriminator_against == "student" else self.student.reference
        assert against is not None, "discriminator_against='reference' needs a frozen reference: run warmup first"
        budget = self.language_model.within(self.config.token_budget)
        baseline = against.logprobs_of(rows, self.config.temperature, budget)
        with self.language_model.active(train=torch.is_grad_enabled()):
            values, mask = self.language_model.logprobs(rows)
        return self.config.discriminator_scale * (values - baseline) * mask, mask


def _read_saved(folder: Path) -> tuple[GADConfig, dict[str, Tensor]]:
    try:
        record = json.loads((folder / RECORD).read_bytes())
        tensors = safetensors.torch.load((folder / WEIGHTS).read_bytes())
    except (OSError, ValueError, RecursionError, safetensors.SafetensorError) as error:
        why = getattr(error, "strerror", None) or error
        raise UserError(
            f"{str(folder)!r} holds no discriminator that can be read ({why}); give the discriminator/ of a finished run"
        ) from error
    if not isinstance(record, dict) or not isinstance(record.get("config"), dict):
        raise UserError(f"{folder / RECORD} holds no configuration; restore it from a copy")
    return GADConfig().replace(**record["config"]), tensors


def _in_order(parts: Sequence[Sequence[int]], scored: Sequence[Scores]) -> Scores:
    """Put rows that were scored in parts back in their order, padded to one length.

    What was scored beyond the parts, to keep other processes company, adds nothing but its place in the backward pass.
    """
    nothing = [0 * scores.scores.sum() for scores in scored[len(parts) :]]
    scored = scored[: len(parts)]
    order = torch.tensor([i for part in parts for i in part]).argsort()
    width = max(scores.mask.shape[1] for scores in scored)

    def joined(tensors: list[Tensor]) -> Tensor:
        return torch.cat([F.pad(t, (0, width - t.shape[1])) for t in tensors])[order]

    prefixes = [scores.prefix_scores for scores in scored if scores.prefix_scores is not None]
    whole, prefix = torch.cat([scores.scores for scores in scored])[order], joined(prefixes) if prefixes else None
    for zero in nothing:
        whole, prefix = whole + zero, None if prefix is None else prefix + zero
    return Scores(whole, prefix, joined([scores.mask for scores in scored]))


def _load_own(config: GADConfig, tokenizer: Any) -> LanguageModel:
    """Load a discriminator's own model. One that reads both ways trains all its weights: it is small, and has no LoRA names."""
    name = config.discriminator_model
    if name not in TOY_SIZES:
        folder = hub.resolve(name)
        if hub.is_encoder(folder):
            return Encoder(*hub.load_encoder(folder, torch.device("cuda" if torch.cuda.is_available() else "cpu")))
    return load_language_model(name, config, adapter="discriminator", tokenizer=tokenizer)


def _zero_head(language_model: LanguageModel) -> nn.Linear:
    """A float32 head that starts at zero: no text has a reward before the discriminator has learnt anything.

    No bias: Bradley-Terry compares scores and cannot see one.
    """
    head = nn.Linear(language_model.hidden_size, 1, bias=False, device=language_model.device)
    nn.init.zeros_(head.weight)
    return head


def _check_encoder(encoder: Encoder, config: GADConfig) -> None:
    """Refuse what a model that reads both ways cannot do, before the first text comes."""
    model = f"config field 'discriminator_model' is {config.discriminator_model!r}, which reads both ways"
    if config.discriminator != "sequence":
        why = "compares token by token" if config.discriminator == "implicit" else "scores a text before it has ended"
        raise UserError(f"{model}, but discriminator {config.discriminator!r} {why}; use 'sequence'")
    if config.discriminator_sft_epochs:
        raise UserError(
            f"{model} and writes nothing, but discriminator_sft_epochs is {config.discriminator_sft_epochs:g}; set it to 0"
        )
    needed, room = config.max_prompt_length + config.max_completion_length, encoder.max_length
    if 2 * needed + 1 > room:
        raise UserError(
            f"{model} and at most {room} tokens, but max_prompt_length + max_completion_length is {needed} of the student's, "
            f"up to twice as many of its own; lower them to {(room - 1) // 2} together, or take a discriminator with a "
            "longer context"
        )


def _check_same_tokens(language_model: LanguageModel, student: Student) -> None:
    if language_model.tokenizer.get_vocab() != student.tokenizer.get_vocab():
        raise UserError(
            "config field 'discriminator' is 'implicit', which compares token by token, but discriminator_model "
            "has another tokenizer than the student; use 'sequence', or a model of the student's family"
        )

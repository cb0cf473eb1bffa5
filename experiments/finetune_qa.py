"""Fine-tunes a model to answer questions: `python experiments/finetune_qa.py --cfg experiments/configs/finetune_qa.toml`.

The loss is the cross-entropy of the right answers' tokens, and the model is measured on questions held out, before and after. All
that experiments/train.py does holds here: the run's folder, resuming, overrides such as `--finetune.method lora`, `--help`.
"""

import launch

if __name__ == "__main__":
    launch.with_tuned_malloc()  # Before the imports that take seconds.

import json
import math
import shlex
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import loop
import numpy as np
from jax.sharding import Mesh

from rwkv_jax import accuracy, checkpoint, config, question, run_log, score, sharding
from rwkv_jax.text import get_tokenizer
from rwkv_jax.text.answers import AnswerBatch, Answers, answer_batches, check_choices
from rwkv_jax.text.prompt import encode_pair
from rwkv_jax.text.questions import Item, Question
from rwkv_jax.text.tasks import load_questions

RESULTS = "results.json"


def prepare(settings: config.Settings, mesh: Mesh, rows: np.ndarray) -> loop.Work:
    """Returns a run's questions, as the loop takes them; arguments as in `loop.Prepare`."""
    data, asked = settings.data, settings.questions
    if asked.task is None or settings.finetune.init_from is None:
        raise config.ConfigError("give questions.task, what is asked, and finetune.init_from, the model that learns it")
    if jax.process_count() > 1:
        raise config.ConfigError(f"there are {jax.process_count()} processes; finetune_qa.py runs in one")
    tokenizer = get_tokenizer(data.tokenizer, data.tokenizer_file)
    question.check_tokenizer(tokenizer, settings.model)
    sides = load_questions(asked, data)
    for side in (sides.training, sides.held_out):
        check_choices(side, tokenizer, asked.first_token)
    answers = Answers(sides.training, tokenizer, asked.first_token, data.context_length)
    if sides.repeated:
        print(f"{sides.repeated} questions to train on are left out: they are held out, word for word")
    if answers.too_long:
        print(
            f"{answers.too_long} of {len(sides.training)} questions to train on are left out: they have more than "
            f"data.context_length={data.context_length} tokens, the longest {answers.longest}"
        )
    examples = Examples(settings, tokenizer, sides.held_out)

    def arguments(batch: AnswerBatch) -> dict[str, Any]:
        return {"reset": None, **batch._asdict()}

    def report_(params: Any, start: Any) -> None:
        report(params, start, settings, examples, answers, mesh)

    return loop.Work(
        description=f"{len(answers)} questions of {asked.task}, {len(sides.held_out)} held out",
        identity=answers.identity,
        tokenizer=tokenizer,
        batches=answer_batches(answers, batch_size=data.batch_size, seed=data.seed, rows=rows),
        arguments=arguments,
        bits_per_nat=answers.num_tokens / answers.num_bytes / math.log(2),
        validate=lambda params, start: examples.bits_per_byte(params, start, settings.run.validation_tokens),
        report=report_,
    )


class Examples:
    """The questions held out, as a run measures models by them."""

    def __init__(self, settings: config.Settings, tokenizer: Any, items: Sequence[Item]):
        self._settings, self._tokenizer, self.items = settings, tokenizer, items

    def bits_per_byte(self, params: Any, start: Any, limit: int | None = None) -> float:
        """Returns the code length of the right answers, in bits per byte, of all or of the first `limit` tokens' worth."""
        requests, num_tokens, num_bytes = [], 0, 0
        for item in self.items:
            pair = encode_pair(self._tokenizer, item.question.context, item.gold, self._settings.questions.first_token)
            num_tokens += sum(map(len, pair))
            if limit is not None and requests and num_tokens > limit:
                break
            requests.append(score.Request(*pair))
            num_bytes += len(item.gold.encode())
        model, backend = self._settings.model, self._settings.run.backend
        found = score.score(params, model, requests, start=start, backend=backend)
        return -sum(one.log_likelihood for one in found) / math.log(2) / num_bytes

    def right(self, params: Any, start: Any) -> list[bool]:
        """Returns which questions the model answers rightly."""
        asked = self._settings.questions
        return question.right(
            params, self._settings.model, self._tokenizer, self.items, normalise=asked.normalise,
            first_token=asked.first_token, start=start, backend=self._settings.run.backend,
        )  # fmt: skip

    @property
    def chance(self) -> float | None:
        """Share that guessing would give; None without choices, where it gives next to nothing."""
        sizes = [len(item.question.choices) for item in self.items if isinstance(item.question, Question)]
        return statistics.fmean(1 / size for size in sizes) if sizes else None


def report(
    params: Any, start: Any, settings: config.Settings, examples: Examples, answers: Answers, mesh: Mesh
) -> None:
    """Prints the accuracy of the model tuned and of the result, the gain, and how to repeat it, and writes it all to results.json."""
    folder, asked = Path(settings.run.folder), settings.questions
    base = checkpoint.load_base(folder, sharding.on(mesh))
    models = {"before": (base, None), "after": (params, start)}
    right = {name: examples.right(*model) for name, model in models.items()}
    bits = {name: examples.bits_per_byte(*model) for name, model in models.items()}
    shares = {name: accuracy.share(own) for name, own in right.items()}
    gain, chance = accuracy.gain(right["before"], right["after"]), examples.chance
    guessing = (
        "no choices: every token of the answer must be the likeliest" if chance is None else f"chance {chance:.1%}"
    )
    print(
        f"\n{asked.task}, {len(examples.items)} questions held out, {guessing}; in brackets {accuracy.CONFIDENCE:.0%} intervals:"
    )
    for name, own in shares.items():
        print(f"  {name:7s} {own.value:.1%} [{own.low:.1%}, {own.high:.1%}]   answers {bits[name]:.4f} bits per byte")
    print(
        f"  gain    {100 * gain.value:+.1f} points [{100 * gain.low:+.1f}, {100 * gain.high:+.1f}], {gain.gained} gained and "
        f"{gain.lost} lost, p = {gain.p_value:.2g}{'' if gain.resolved else ': not resolved, the interval has zero in it'}"
    )
    result = {
        "task": asked.task,
        "method": settings.finetune.method,
        "init_from": settings.finetune.init_from,
        "training_items": len(answers),
        "training_items_too_long": answers.too_long,
        "held_out_items": len(examples.items),
        "chance": chance,
        "normalise": asked.normalise,
        "confidence": accuracy.CONFIDENCE,
        **{name: own._asdict() | {"bits_per_byte": bits[name]} for name, own in shares.items()},
        "gain": gain._asdict() | {"resolved": gain.resolved},
        "environment": run_log.environment(),
        "config": config.to_dict(settings),
    }
    (folder / RESULTS).write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"\nresume or repeat:  {shlex.join(['python', *sys.argv])}")
    print(f"results:           {folder / RESULTS}")


if __name__ == "__main__":
    loop.main("finetune_qa.py", prepare)

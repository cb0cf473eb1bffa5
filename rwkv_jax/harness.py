"""The library's models in lm-evaluation-harness, by the name rwkv_jax: importing this module registers them there.

Versions after 0.4.13 find it by its entry point; with 0.4.13, `python -m rwkv_jax.harness` is the harness's own command after this
import: `python -m rwkv_jax.harness --model rwkv_jax --model_args pretrained=runs/quickstart --tasks piqa`.
"""

import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
from tqdm import tqdm

try:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
except ImportError as error:
    raise ImportError(
        f'benchmarks need lm-evaluation-harness ({error}): pip install "rwkv-jax[eval]", or "lm_eval>=0.4.13"'
    ) from error

from .generate import Sampling, prefill, stream
from .lm import count_params
from .pretrained import load_pretrained
from .question import check_tokenizer
from .score import BatchSize, Request, Score, score
from .text.prompt import FirstToken, encode_context, encode_pair, first_tokens
from .text.tokenizers import TokenizerName

_GENERATION = {"until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p"}
_MOST_GENERATED = 256
"""Tokens of a text for which a task names no limit; the harness's own models have the same."""


@register_model("rwkv_jax")
class RWKVHarness(LM):
    """A model of this library as lm-evaluation-harness asks it: log-likelihoods and generated text."""

    def __init__(
        self,
        pretrained: str,
        tokenizer: TokenizerName | None = None,
        tokenizer_file: str | None = None,
        first_token: FirstToken = "newline",
        dtype: str | None = None,
        backend: str | None = None,
        ln_x_eps: float | None = None,
        batch_size: int | str = "auto",
        max_batch_size: int | None = None,
        device: str | None = None,
    ):
        """Loads the model; the harness's `--model_args` are these, its `--batch_size` too.

        Args:
            pretrained: Whatever `rwkv_jax.load` reads.
            tokenizer: Its name; None is the one that the model was trained with.
            tokenizer_file: Its vocabulary; None is an installed or downloaded one.
            first_token: What stands before every context: newline, zero or none; recorded in the results.
            dtype: Of parameters and activations; None keeps the file's.
            backend: Of the WKV operator; None is the best here.
            ln_x_eps: As in `rwkv_jax.load`.
            batch_size: Rows read together, or "auto".
            max_batch_size: Not used: "auto" begins with `score.AUTO_ROWS`.
            device: Not used: the harness's default is "cuda:0" everywhere, and JAX has its own, which the results record.

        Raises:
            ValueError: The tokenizer does not fit, or an argument is out of range.
        """
        super().__init__()
        del max_batch_size, device
        self._name = pretrained
        self._params, self._config, self._tokenizer, self._start = load_pretrained(
            pretrained, tokenizer=tokenizer, tokenizer_file=tokenizer_file, dtype=dtype, ln_x_eps=ln_x_eps
        )
        check_tokenizer(self._tokenizer, self._config)
        first_tokens(self._tokenizer, first_token)
        self._first_token: FirstToken = first_token
        self._backend = backend
        self._batch_size: BatchSize = _batch_size(batch_size)

    def get_model_info(self) -> dict[str, Any]:
        """Returns what the harness records of the model beside its results."""
        return {
            "pretrained": self._name,
            "architecture": self._config.architecture,
            "model_num_parameters": count_params(self._config),
            "model_dtype": self._config.dtype,
            "tokenizer": self._tokenizer.name,
            "first_token": self._first_token,
            "backend": self._backend,
            "jax_device": jax.devices()[0].device_kind,
        }

    def loglikelihood(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Returns log p of each continuation given its context, and whether it is what greedy decoding gives."""
        pairs: list[tuple[Any, ...]] = [request.args for request in requests]
        encoded = [Request(*encode_pair(self._tokenizer, before, own, self._first_token)) for before, own in pairs]
        answers = [(one.log_likelihood, one.is_greedy) for one in self._score(encoded, "loglikelihood", disable_tqdm)]
        self._cache("loglikelihood", pairs, answers)
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Returns log p of each text, from its start and whole: the state is carried, and nothing is cut off."""
        texts = [request.args[0] for request in requests]
        nothing = encode_context(self._tokenizer, "", self._first_token)
        encoded = [Request(nothing, self._tokenizer.encode(text)) for text in texts]
        scores = self._score(encoded, "loglikelihood_rolling", disable_tqdm)
        answers = [one.log_likelihood for one in scores]
        self._cache("loglikelihood_rolling", [(text,) for text in texts], answers)
        return answers

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Returns the continuation of each context until a stop string, the end of the document or max_gen_toks."""
        answers = []
        pairs: list[tuple[Any, ...]] = [request.args for request in requests]
        for seed, (context, options) in enumerate(tqdm(pairs, desc="generate_until", disable=disable_tqdm)):
            answers.append(self._generate(context, options, seed))
        self._cache("generate_until", pairs, answers)
        return answers

    def _generate(self, context: str, options: dict[str, Any], seed: int) -> str:
        if unknown := sorted(options.keys() - _GENERATION):
            raise ValueError(
                f"generation_kwargs has {', '.join(unknown)}; known here are {', '.join(sorted(_GENERATION))}"
            )
        temperature = float(options.get("temperature", 1.0 if options.get("do_sample") else 0.0))
        sampling = Sampling(
            temperature=temperature if options.get("do_sample", temperature > 0) else 0.0,
            top_k=int(options.get("top_k", 0)),
            top_p=float(options.get("top_p", 1.0)),
        )
        until = options.get("until") or []
        before = first_tokens(self._tokenizer, self._first_token)
        state = prefill(self._params, self._config, before, self._start)[1] if before.size else self._start
        pieces = stream(
            self._params, self._config, self._tokenizer, context,
            max_tokens=int(options.get("max_gen_toks", _MOST_GENERATED)), sampling=sampling,
            stop=[until] if isinstance(until, str) else [text for text in until if text], seed=seed, state=state,
        )  # fmt: skip
        return "".join(pieces)

    def _score(self, requests: list[Request], kind: str, disable_tqdm: bool) -> list[Score]:
        with tqdm(total=len(requests), desc=kind, disable=disable_tqdm) as bar:
            report: Callable[[int], object] = bar.update
            return score(
                self._params, self._config, requests,
                batch_size=self._batch_size, start=self._start, backend=self._backend, report=report,
            )  # fmt: skip

    def _cache(self, kind: str, arguments: Sequence[tuple], answers: Sequence[Any]) -> None:
        for own, answer in zip(arguments, answers, strict=True):
            self.cache_hook.add_partial(kind, own, answer)


def _batch_size(given: int | str) -> BatchSize:
    """The harness gives text, and "auto:N" for a size that is found again N times, which is not needed here."""
    if str(given).partition(":")[0] == "auto":
        return "auto"
    try:
        size = int(given)
    except ValueError:
        size = 0
    if size < 1:
        raise ValueError(f"batch_size is {given!r}; it must be auto or a whole number from 1 on")
    return size


def main() -> None:
    """Runs the harness's command line with these models registered."""
    from lm_eval.__main__ import cli_evaluate

    # The harness would fork to bootstrap, which is not safe beside JAX's threads.
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    cli_evaluate()


if __name__ == "__main__":
    main()

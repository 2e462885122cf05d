"""Adapter that lets lm-evaluation-harness run models of kronjax.

    python -m kronjax.lm.evaluation.harness --model_args pretrained=out/ --tasks TASK

is the command line of `lm_eval` with the additional model type `kronjax`; in a program,
`register()` adds that type. `Adapter` does the work, without the harness: it turns
texts into tokens and windows as the harness does for models of Hugging Face, so that
the results of a folder and of its export can be compared.

References: Gao et al., lm-evaluation-harness.

>>> [(len(before), len(after)) for before, after in windows([1] * 10, 0, most=4)]
[(1, 4), (1, 4), (3, 2)]
"""

import functools
import importlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from kronjax.io.progress import bar
from kronjax.lm.checkpoints import hugging_face
from kronjax.lm.evaluation import perplexity
from kronjax.lm.models import generation
from kronjax.lm.models.base import LanguageModel, tokenizer_of

MAX_NEW_TOKENS = 256
"""Number of tokens to generate if a task does not say."""

_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_SETTINGS = {"until", "do_sample", "temperature", "top_k", "top_p", *_LENGTHS}
_NEUTRAL = {"num_beams": 1, "repetition_penalty": 1.0}


class Adapter:
    """The three kinds of requests of the harness, for texts.

    Args:
        model: A model whose tokenizer has a token that begins or ends texts.
        batch: Number of texts at a time; None for enough to keep the device busy.
        add_bos_token: Whether to add the tokens that the tokenizer puts around a text;
            None means True.
        max_length: Number of positions to use; by default all that the model has.

    Raises:
        ValueError: If the model has no tokenizer, or the tokenizer no such token, or
            `max_length` exceeds the model's context.
    """

    def __init__(
        self,
        model: LanguageModel,
        *,
        batch: int | None = None,
        add_bos_token: bool | None = None,
        max_length: int | None = None,
    ) -> None:
        """Store the model and check the settings."""
        self.model, self.batch = model, batch
        self.tokenizer = tokenizer_of(model)
        self.special = add_bos_token is not False
        context = model.config.context
        self.length = context if max_length is None else max_length
        if not 1 < self.length <= context:
            raise ValueError(
                f"max_length is {self.length}; the model has {context} positions"
            )
        bos, eos = self.tokenizer.bos, self.tokenizer.eos
        prefix = eos if bos is None else bos
        if prefix is None:
            raise ValueError(
                "the tokenizer has no token that begins texts; set bos_token in "
                "tokenizer_config.json"
            )
        self.prefix = prefix

    def loglikelihood(self, pairs: Sequence[tuple[str, str]]) -> list[Any]:
        """Return the log-likelihoods of continuations.

        Args:
            pairs: Pairs of a context, which may be empty, and a continuation.

        Returns:
            For each pair the sum of the log-likelihoods of the continuation's tokens,
            in nats, and whether each of them was the most likely token.
        """
        return self._score([self.encode_pair(*pair) for pair in pairs])

    def loglikelihood_rolling(self, texts: Sequence[str]) -> list[float]:
        """Return the log-likelihoods of whole texts of any length, in nats.

        A text is scored in windows that overlap in one token. The last window is as
        long as the others, and only its new tokens are scored.
        """
        parts = [
            list(windows(self._encode(text), self.prefix, most=self.length))
            for text in texts
        ]
        scores = iter(self._score([pair for windows in parts for pair in windows]))
        return [sum(next(scores)[0] for _ in windows) for windows in parts]

    def generate_until(
        self, requests: Sequence[tuple[str, Mapping[str, Any]]]
    ) -> list[str]:
        """Continue texts until one of several endings.

        Args:
            requests: Pairs of a text and its settings: `until`, an ending or several;
                `max_gen_toks`; `do_sample`, `temperature`, `top_k`, `top_p`. If a text
                leaves no room for the new tokens, its first tokens are dropped.

        Returns:
            The continuation of each text, up to the first ending.

        Raises:
            ValueError: If a setting is unknown, or leaves no room for the text.
        """
        groups: dict[str, list[int]] = {}
        for i, (_, settings) in enumerate(requests):
            key = json.dumps(dict(settings), sort_keys=True, default=str)
            groups.setdefault(key, []).append(i)
        rows = [self._encode(text) or [self.prefix] for text, _ in requests]
        texts, size = [""] * len(requests), self.batch or 8
        with bar(len(requests), "generating", unit="texts") as advance:
            for members in groups.values():
                # Sorted by length, since prompts of a batch are padded to the longest.
                members.sort(key=lambda i: -len(rows[i]))
                for first in range(0, len(members), size):
                    chunk = members[first : first + size]
                    settings = requests[chunk[0]][1]
                    new = self._continue([rows[i] for i in chunk], settings)
                    for i, text in zip(chunk, new, strict=True):
                        texts[i] = text
                    advance(len(chunk))
        return texts

    def encode_pair(self, context: str, continuation: str) -> tuple[list, list]:
        """Return the tokens of a context and of its continuation.

        The tokens of the continuation are those of the joined text after the tokens of
        the context. Spaces between the two belong to the continuation.
        """
        if not context:
            after = self._encode(continuation, special=False)
            if after[:1] == [self.prefix]:
                return after[:1], after[1:]
            return [self.prefix], after
        stripped = context.rstrip()
        if not stripped:  # only spaces
            whole = self._encode(context + continuation, special=False)
            return [self.prefix], whole
        # Not the first tokens of the joined text: where a token crosses the border, the
        # context keeps its own tokens, as in the harness.
        before = self._encode(stripped)
        return before, self._encode(context + continuation)[len(before) :]

    def _encode(self, text: str, special: bool | None = None) -> list[int]:
        special = self.special if special is None else special
        return self.tokenizer.encode(text, special=special).tolist()

    def _score(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[Any]:
        room = self.length + 1
        for before, after in pairs:
            if len(after) > self.length:
                raise ValueError(
                    f"a continuation has {len(after)} tokens, more than the "
                    f"{self.length} positions to use"
                )
            del before[: max(0, len(before) + len(after) - room)]
        return perplexity.log_likelihoods(self.model, pairs, batch=self.batch)

    def _continue(
        self, rows: Sequence[list[int]], settings: Mapping[str, Any]
    ) -> list[str]:
        """Return the continuations of rows of tokens with the same settings."""
        options, until = _options(settings)
        room = self.length - options["max_new_tokens"]
        if room < 1:
            raise ValueError(
                f"{options['max_new_tokens']} new tokens leave no room for a text: "
                f"the positions to use are {self.length}"
            )
        eos = self.tokenizer.eos
        stop = () if eos is None else (eos,)
        drawn: list[list[int]] = [[] for _ in rows]

        def ended(row):
            text = self.tokenizer.decode(row)
            return eos in row or any(ending in text for ending in until)

        def on_token(tokens):
            for row, token in zip(drawn, tokens, strict=True):
                row.append(token)
            return all(map(ended, drawn))

        new = generation.generate_tokens(
            self.model,
            [row[-room:] for row in rows],
            stop=stop,
            on_token=on_token,
            **options,
        )
        texts = [self.tokenizer.decode(row) for row in new]
        for ending in until:
            texts = [text.split(ending)[0] for text in texts]
        return texts


def windows(
    tokens: Sequence[int], prefix: int, *, most: int
) -> Iterator[tuple[list[int], list[int]]]:
    """Yield pairs of context and continuation that together score each token once.

    Args:
        tokens: Tokens to score.
        prefix: Token that stands before them.
        most: Largest number of tokens that the model reads at once.

    Yields:
        Tokens of a context and of a continuation, of which only the continuation is
        scored. The last pair is as long as the others.
    """
    whole = [prefix, *tokens]
    for start in range(1, len(whole), most):
        stop = min(start + most, len(whole))
        yield whole[max(stop - most - 1, 0) : start], whole[start:stop]


@functools.cache
def register() -> type:
    """Add the model type `kronjax` to lm-evaluation-harness.

    Returns:
        The class of this model type.

    Raises:
        ImportError: If the harness is missing; the message names the extra to install.
    """
    api = _harness("api.model")

    @_harness("api.registry").register_model("kronjax")
    class Kronjax(api.LM):
        """A folder of kronjax or Hugging Face, a GGUF file or a name on the hub."""

        def __init__(
            self,
            pretrained: str,
            dtype: str | None = None,
            batch_size: int | str = 1,
            add_bos_token: bool | None = None,
            max_length: int | None = None,
            max_batch_size: int | None = None,
            device: str | None = None,
        ) -> None:
            super().__init__()
            # `device` is ignored: the harness passes "cuda:0" by default. jax uses the
            # fastest device, or the one in the variable JAX_PLATFORMS.
            model = hugging_face.load(
                pretrained, dtype=None if dtype == "auto" else dtype
            )
            auto = str(batch_size).startswith("auto")
            self.adapter = Adapter(
                model,
                batch=max_batch_size if auto else int(batch_size),
                add_bos_token=add_bos_token,
                max_length=max_length,
            )

        def loglikelihood(self, requests, disable_tqdm=False):
            return self.adapter.loglikelihood([request.args for request in requests])

        def loglikelihood_rolling(self, requests, disable_tqdm=False):
            texts = [request.args[0] for request in requests]
            return self.adapter.loglikelihood_rolling(texts)

        def generate_until(self, requests, disable_tqdm=False):
            return self.adapter.generate_until([request.args for request in requests])

    return Kronjax


def main() -> None:
    """Run the command line of lm-evaluation-harness with the model type `kronjax`."""
    register()
    arguments = sys.argv[1:]
    runs = not arguments or arguments[0].startswith("-") or arguments[0] == "run"
    for names, value in (
        (("--model", "-M"), "kronjax"),
        (("--batch_size", "-b"), "auto"),
    ):
        if runs and not any(x.split("=")[0] in names for x in arguments):
            arguments += [names[0], value]
    sys.argv[1:] = arguments
    _harness("__main__").cli_evaluate()


def _harness(name: str) -> Any:
    """Return a module of lm-evaluation-harness."""
    try:
        return importlib.import_module(f"lm_eval.{name}")
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "lm_eval":
            raise
        raise ImportError(
            "lm-evaluation-harness is missing: pip install 'kronjax[eval]'"
        ) from error


def _options(settings: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the options of `generate_tokens`, and the endings."""
    unknown = {
        name: value
        for name, value in settings.items()
        if name not in _SETTINGS and _NEUTRAL.get(name, ...) != value
    }
    if unknown:
        raise ValueError(
            f"generation settings {unknown} are not supported; supported are "
            f"{', '.join(sorted(_SETTINGS))}"
        )
    until = settings.get("until") or []
    lengths = [settings[name] for name in _LENGTHS if settings.get(name) is not None]
    options: dict[str, Any] = {
        "max_new_tokens": int((lengths or [MAX_NEW_TOKENS])[0]),
        "temperature": 0.0,
    }
    if settings.get("do_sample", settings.get("temperature")):
        temperature = settings.get("temperature")
        options["temperature"] = float(1.0 if temperature is None else temperature)
        options["top_k"] = settings.get("top_k") or None
        options["top_p"] = float(settings.get("top_p") or 1.0)
    endings = [until] if isinstance(until, str) else list(until)
    return options, [ending for ending in endings if ending]


if __name__ == "__main__":
    main()

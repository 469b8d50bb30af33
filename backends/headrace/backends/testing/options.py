"""What a model declares, it does."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence

import pytest
from pydantic import BaseModel

from headrace.backends.events import FinishReason
from headrace.backends.requests import MAX_CHOICES, MAX_TOP_LOGPROBS, ResponseOptions, Sampling, Stopping
from headrace.backends.testing.calls import Answer, AnyModel
from headrace.backends.testing.demand import demand
from headrace.backends.testing.request_options import REQUEST_OPTIONS, SCORING_OPTIONS
from headrace.backends.testing.serving import Served
from headrace.backends.testing.setting import Setting

_INPUTS = ("text", "token_ids.ids", "chat.messages.content.text", "infill.prefix")
_NUM_SEEDS = 6
_HOT = 2.0
"""A temperature at which seeds tell."""
_SLACK = 1e-4
"""Of a log-probability."""


class OptionTests(Setting):
    """Capabilities; each test of an option is skipped if the option is not declared."""

    def test_what_is_declared_exists(self, model: AnyModel) -> None:
        capabilities = getattr(model, "capabilities", None)
        if capabilities is None:
            pytest.skip("not there: capabilities of its own; a step-wise model has those of the engine")
        unknown = sorted(capabilities.options - REQUEST_OPTIONS - SCORING_OPTIONS)
        meant = {path: difflib.get_close_matches(path, REQUEST_OPTIONS, 1) for path in unknown}
        demand(
            not unknown,
            "Capabilities.options are paths of request fields, such as 'sampling.top_k' (headrace.backends.testing."
            "request_options has them all): no request has another, so it would never be honoured",
            seen=", ".join(f"{path!r}" + (f" (meant: {near[0]!r}?)" if near else "") for path, near in meant.items()),
            read="api.Capabilities.options",
        )
        demand(
            not capabilities.options.isdisjoint(_INPUTS),
            f"a model takes one kind of input at least: {', '.join(_INPUTS)}",
            seen=sorted(capabilities.options),
            read="api.Capabilities.options",
        )
        demand(
            model.tokenizer is not None or "token_ids.ids" not in capabilities.options,
            "a model without a tokenizer gets no token ids",
            seen="token_ids.ids is declared, and the tokenizer is None",
            read="api.Model.tokenizer",
        )
        for option, value, none, most in (
            ("n", capabilities.max_n, 1, MAX_CHOICES),
            ("response.top_logprobs", capabilities.max_top_logprobs, 0, MAX_TOP_LOGPROBS),
        ):
            demand(
                none <= value <= most and (value > none) == (option in capabilities.options),
                f"the limit of {option!r} is {none} to {most}, and above {none} if and only if it is declared",
                seen=f"{value}, and it is {'' if option in capabilities.options else 'not '}declared",
                read="api.Capabilities",
            )
        shapeless = [
            name
            for name, shape in capabilities.extensions.items()
            if not (isinstance(shape, type) and issubclass(shape, BaseModel))
        ]
        demand(
            not shapeless,
            "each name of Capabilities.extensions has its shape, a pydantic model",
            seen=shapeless,
            read="api.Capabilities.extensions",
        )

    def test_a_stop_sequence_ends_the_text_and_no_part_of_it_leaks(
        self, served: Served, answers: Sequence[Answer]
    ) -> None:
        served.need("stopping.stop_sequences")
        tried = 0
        for prompt, text in self._prompts_and_texts(answers):
            for stop in _stops(text):
                tried += 1
                call = served.make_call(
                    prompt, max_new_tokens=self.answer_tokens, stopping=Stopping(stop_sequences=(stop,))
                )
                answer = served.answer(call)
                got, finish, expected = answer.text(), answer.finish(), text[: text.find(stop)]
                if not served.is_bit_exact and finish.reason is not FinishReason.STOP_SEQUENCE:
                    continue  # it said something else this time
                demand(
                    stop not in got and (got == expected or not served.is_bit_exact),
                    f"the text ends before the stop sequence {stop!r}, also where it lies in several deltas",
                    seen=f"{got!r} of {text!r}, in deltas {[delta.text for delta in answer.deltas()]}",
                    read="requests.Stopping",
                )
                demand(
                    (finish.reason, finish.stop_sequence) == (FinishReason.STOP_SEQUENCE, stop),
                    f"the choice's reason is STOP_SEQUENCE, and stop_sequence is {stop!r}",
                    seen=finish,
                    read="events.ChoiceFinish",
                )
        if not tried:
            pytest.skip("not there: an answer long enough to be stopped")

    def test_what_only_begins_like_a_stop_sequence_is_shown(self, served: Served, answers: Sequence[Answer]) -> None:
        served.need("stopping.stop_sequences")
        if not served.is_bit_exact:
            pytest.skip("not declared: DeterminismClass.BIT_EXACT")
        for prompt, text in self._prompts_and_texts(answers):
            for start in {len(text) // 2, max(0, len(text) - 2)}:
                stop = text[start : start + 5] + "\x01"
                call = served.make_call(
                    prompt, max_new_tokens=self.answer_tokens, stopping=Stopping(stop_sequences=(stop,))
                )
                got = served.answer(call).text()
                demand(
                    got == text,
                    f"text that only begins like the stop sequence {stop!r} is held back no longer than it has to be",
                    seen=f"{got!r}, and without the stop sequence {text!r}",
                    read="requests.Stopping",
                )

    def test_a_stop_token_ends_the_choice(self, served: Served, answers: Sequence[Answer]) -> None:
        served.need("stopping.stop_token_ids", "response.token_ids")
        answer = max(answers, key=lambda answer: len(set(answer.shown_ids())))
        ids = answer.shown_ids()
        at = max(range(len(ids)), key=lambda i: (ids[i] not in ids[:i], i))
        call = served.make_call(
            answer.call.request.input, max_new_tokens=self.answer_tokens, stopping=Stopping(stop_token_ids=(ids[at],))
        )
        stopped = served.answer(call)
        finish = stopped.finish()
        if not served.is_bit_exact and finish.reason is not FinishReason.STOP_TOKEN:
            pytest.skip("not there: the same answer again, so that a token of it could be met")
        demand(
            (finish.reason, finish.stop_token_id, stopped.token_ids()[-1:])
            == (FinishReason.STOP_TOKEN, ids[at], [ids[at]])
            and ids[at] not in stopped.token_ids()[:-1],
            f"a choice ends with its first stop token, {ids[at]}: reason STOP_TOKEN, stop_token_id, last of token_ids",
            seen=f"{finish}, token_ids {stopped.token_ids()}",
            read="requests.Stopping",
        )

    def test_an_answer_has_no_fewer_tokens_than_it_must(self, served: Served) -> None:
        count = self.answer_tokens
        for prompt in self.prompts[:3]:
            call = served.make_call(prompt, max_new_tokens=count, stopping=Stopping(min_new_tokens=count))
            got = served.answer(call).call.meter.usage().output_tokens
            demand(
                got == count,
                f"a choice has at least min_new_tokens ({count}) tokens",
                seen=got,
                read="requests.Stopping",
            )

    def test_a_seed_repeats_its_answer_and_seeds_differ(self, served: Served) -> None:
        served.need("determinism.seed")
        hot = served.declares("sampling.temperature")
        sampling = Sampling(temperature=_HOT) if hot else Sampling()

        def answer(seed: int) -> str:
            call = served.make_call(self.prompts[0], max_new_tokens=self.answer_tokens, sampling=sampling, seed=seed)
            found = served.answer(call)
            demand(
                found.finish().seed == seed,
                f"a choice's finish gives the seed that reproduces it, here the request's: {seed}",
                seen=found.finish(),
                read="events.ChoiceFinish",
            )
            return found.text()

        texts = [answer(seed) for seed in range(1, _NUM_SEEDS + 1)]
        again = answer(1)
        demand(
            again == texts[0] or not served.is_bit_exact,
            "the same seed and request give the same answer",
            seen=f"{texts[0]!r}, then {again!r}",
            read="requests.GenerateRequest",
        )
        demand(
            not hot or len(set(texts)) > 1,
            f"seeds make a difference at temperature {_HOT}",
            seen=f"{_NUM_SEEDS} seeds gave {texts[0]!r}",
            read="requests.GenerateRequest",
        )

    def test_one_candidate_is_the_greedy_choice(self, served: Served, answers: Sequence[Answer]) -> None:
        served.need("sampling.top_k", "sampling.temperature")
        if not served.is_bit_exact:
            pytest.skip("not declared: DeterminismClass.BIT_EXACT")
        for prompt, text in self._prompts_and_texts(answers)[:3]:
            sampling = Sampling(temperature=_HOT, top_k=1)
            got = served.answer(served.make_call(prompt, max_new_tokens=self.answer_tokens, sampling=sampling)).text()
            demand(got == text, "top_k = 1 is greedy", seen=f"{got!r}, and greedy {text!r}", read="requests.Sampling")

    def test_a_bias_makes_a_token_come(self, served: Served, answers: Sequence[Answer]) -> None:
        served.need("sampling.logit_bias", "response.token_ids")
        tokenizer = served.model.tokenizer
        wanted = tokenizer.encode(self.prompts[1]).ids[-1] if tokenizer else answers[1].shown_ids()[-1]
        call = served.make_call(self.prompts[0], max_new_tokens=3, sampling=Sampling(logit_bias={wanted: 100.0}))
        ids = served.answer(call).token_ids()
        demand(
            ids == [wanted] * 3,
            f"a bias of 100 for token {wanted} makes it the likeliest",
            seen=f"tokens {ids}",
            read="requests.Sampling",
        )

    def test_each_token_has_its_logprob(self, served: Served) -> None:
        served.need("response.logprobs")
        most = min(3, served.capabilities.max_top_logprobs)
        token_ids = served.declares("response.token_ids")
        response = ResponseOptions(logprobs=True, top_logprobs=most, token_ids=token_ids)
        call = served.make_call(self.prompts[0], max_new_tokens=self.answer_tokens, response=response)
        answer = served.answer(call)
        logprobs = answer.logprobs()
        demand(
            len(logprobs) == call.meter.usage().output_tokens
            and (not token_ids or [entry.token_id for entry in logprobs] == answer.token_ids()),
            "each output token has its TokenLogprob, in order",
            seen=f"{[entry.token_id for entry in logprobs]} for tokens {answer.token_ids()}",
            read="events.TokenLogprob",
        )
        for entry in logprobs:
            values = [top.logprob for top in entry.top]
            demand(
                entry.logprob <= _SLACK
                and len(entry.top) == most
                and values == sorted(values, reverse=True)
                and all(value <= _SLACK for value in values)
                and (not values or entry.logprob <= values[0] + _SLACK),
                f"log-probabilities are natural and at most 0, with the {most} likeliest tokens, likeliest first",
                seen=entry,
                read="events.TokenLogprob",
            )
            if tokenizer := served.model.tokenizer:
                shown = [(top.token_id, top.token) for top in entry.top] + [(entry.token_id, entry.token)]
                wrong = [
                    token for token_id, token in shown if token_id is None or tokenizer.token_bytes(token_id) != token
                ]
                demand(
                    not wrong, "`token` is the token's bytes", seen=f"{wrong} in {entry}", read="events.TokenLogprob"
                )

    def _prompts_and_texts(self, answers: Sequence[Answer]) -> list[tuple[str, str]]:
        """The longest of the plain answers."""
        found = [(prompt, answer.text()) for prompt, answer in zip(self.prompts, answers, strict=True)]
        return sorted(found, key=lambda pair: -len(pair[1]))[:3]


def _stops(text: str) -> Iterator[str]:
    """Pieces of a text that do not occur before, of several lengths."""
    for length in (1, 3, 8):
        for start in range(len(text) // 3, len(text) - length + 1):
            stop = text[start : start + length]
            if text.find(stop) == start and "\ufffd" not in stop:
                yield stop
                break

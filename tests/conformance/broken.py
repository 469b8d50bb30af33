"""Backends that are each broken in one way, and the tests of the kit that must catch them.

Not collected by itself: ``test_kit_catches`` runs it and looks at what failed.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from headrace.backends.api import API_VERSION, Encoding, ModelCard
from headrace.backends.errors import BackendError, ModelNotFound
from headrace.backends.events import ChoiceFinish, Delta, FinishReason, StreamEnd, ToolCallDelta
from headrace.backends.logits import HostLogits
from headrace.backends.scripted import EOS, ByteTokenizer, ScriptedModelOptions, ScriptedStepModel
from headrace.backends.testing import BackendConformance
from headrace.backends.usage import AttemptOutcome
from headrace.server.engine.testing import run_in_engine
from tests.conformance.whole_call import ANSWERS, Choice, FullBackend, FullModel, NoOptions


class StepBackend:
    """Offers one step-wise model, which ``make`` makes."""

    name = "scripted"
    api_version = API_VERSION
    Options = NoOptions

    def __init__(self, make: Callable[[], ScriptedStepModel]) -> None:
        self._make = make

    def list_models(self):
        return [self._make().card]

    def load(self, name):
        if name != "step":
            raise ModelNotFound(name, ("step",))
        return self._make()


class StepModel(ScriptedStepModel):
    def __init__(self, **options: object) -> None:
        super().__init__("step", ScriptedModelOptions(num_slots=4, num_kv_tokens=2048, **options))


# --- healthy ones --------------------------------------------------------------------------------------------------


class TestHealthyCall(BackendConformance):
    failing_prompt = "\0"

    @pytest.fixture(scope="class")
    @classmethod
    def backend(cls):
        return FullBackend()


class TestHealthyStep(BackendConformance):
    engine = staticmethod(run_in_engine)
    failing_prompt = "\0"

    @pytest.fixture(scope="class")
    @classmethod
    def backend(cls):
        return StepBackend(lambda: StepModel(seconds_per_step=0.0005, mixes=True, max_drafts=4, max_scores=16))


HEALTHY = (TestHealthyCall, TestHealthyStep)


# --- the register of broken ones -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """``test`` of the kit must fail, and say ``says``."""

    suite: str
    test: str
    says: str


CASES: list[Case] = []


def caught_by(test: str, says: str, **attributes: object):
    """Registers a broken model, or a broken backend."""

    def register(broken: type) -> type:
        def backend(cls):
            if hasattr(broken, "load"):
                return broken()
            return StepBackend(broken) if issubclass(broken, StepModel) else FullBackend(broken)

        suite = f"Test{broken.__name__}"
        body = {"failing_prompt": "\0", **attributes, "backend": pytest.fixture(scope="class")(classmethod(backend))}
        globals()[suite] = type(suite, (BackendConformance,), body)
        CASES.append(Case(suite, test, says))
        return broken

    return register


# --- life ----------------------------------------------------------------------------------------------------------


@caught_by("test_the_backend_says_its_name_its_api_version_and_its_options", "`api_version`")
class WrittenForAnotherVersion(FullBackend):
    api_version = (API_VERSION[0] + 1, 0)


@caught_by("test_models_are_listed_with_distinct_names_and_a_context", "a name of its own")
class ListsAModelTwice(FullBackend):
    def list_models(self):
        return [*super().list_models(), *super().list_models()]


@caught_by("test_a_loaded_model_is_the_one_that_was_asked_for", "also has problem")
class HasNoHealth(FullBackend):
    def load(self, name):
        class Unhealthy:
            def __init__(self, model):
                self.card, self.backend, self.determinism = model.card, model.backend, model.determinism
                self.tokenizer, self.capabilities, self.generate = model.tokenizer, model.capabilities, model.generate

            def close(self):
                pass

        return Unhealthy(super().load(name))


@caught_by("test_a_loaded_model_is_the_one_that_was_asked_for", "gives 'full'")
class LoadsAnotherModel(FullModel):
    def __init__(self):
        super().__init__()
        self.card = ModelCard(name="other", context_length=4096)


@caught_by("test_a_name_that_is_not_listed_is_refused", "it gave a model")
class LoadsWhateverItIsAsked(FullBackend):
    def load(self, name):
        return super().load("full")


@caught_by("test_a_name_that_is_not_listed_is_refused", "KeyError")
class RefusesWithAKeyError(FullBackend):
    def load(self, name):
        return {"full": super().load}[name](name)


@caught_by("test_a_healthy_model_has_no_problem_and_says_so_at_once", "RuntimeError: no connection")
class ProblemRaises(FullModel):
    def problem(self):
        raise RuntimeError("no connection")


@caught_by("test_a_healthy_model_has_no_problem_and_says_so_at_once", "never blocks it")
class ProblemBlocks(FullModel):
    def problem(self):
        time.sleep(0.02)


@caught_by("test_loading_and_closing_again_and_again_leaves_nothing_behind", "thread 'forgotten'")
class LeavesAThread(FullModel):
    def __init__(self):
        super().__init__()
        threading.Thread(target=time.sleep, args=(30,), name="forgotten", daemon=True).start()


@caught_by("test_loading_and_closing_again_and_again_leaves_nothing_behind", "file descriptor of /dev/null")
class LeavesAFile(FullModel):
    def __init__(self):
        super().__init__()
        os.open("/dev/null", os.O_RDONLY)


@caught_by("test_loading_and_closing_again_and_again_leaves_nothing_behind", "cannot close")
class CannotClose(FullModel):
    def close(self):
        raise RuntimeError("cannot close")


@caught_by("test_a_model_serves_on_while_another_is_loaded_and_closed", "changes nothing for the first")
class SharesStateBetweenModels(FullModel):
    num_closed = 0

    def make_choice(self, call, index):
        choice = super().make_choice(call, index)
        choice.script = ANSWERS[type(self).num_closed % 2].encode()
        return choice

    def close(self):
        type(self).num_closed += 1


# --- tokenizers ----------------------------------------------------------------------------------------------------


def with_tokenizer(kind: type) -> type:
    def make_tokenizer(self):
        FullModel.__init__(self)
        self.tokenizer = kind()

    return type(kind.__name__, (FullModel,), {"__init__": make_tokenizer})


def tokenizer_caught_by(test: str, says: str):
    return lambda kind: caught_by(test, says)(with_tokenizer(kind))


@tokenizer_caught_by("test_text_comes_back_from_its_tokens", "is the same text")
class DropsAccents(ByteTokenizer):
    def encode(self, text):
        return replace(super().encode("".join(c if ord(c) < 128 else "?" for c in text)), text=text)


@tokenizer_caught_by("test_token_ids_lie_in_the_vocabulary", "eos_token_ids are below vocabulary_size")
class EndsOutsideItsVocabulary(ByteTokenizer):
    eos_token_ids = frozenset({EOS, 300})

    def token_bytes(self, token_id):
        return b"" if token_id >= EOS else bytes([token_id])


@tokenizer_caught_by("test_the_bytes_of_tokens_make_the_decoded_text", "joined, are its decoded text")
class BytesAreNotTheText(ByteTokenizer):
    def token_bytes(self, token_id):
        return b"_" if token_id == 32 else super().token_bytes(token_id)


@tokenizer_caught_by("test_the_bytes_of_tokens_make_the_decoded_text", "add nothing to the output")
class ShowsTheEnd(ByteTokenizer):
    def token_bytes(self, token_id):
        return b"<eos>" if token_id == EOS else super().token_bytes(token_id)


@tokenizer_caught_by("test_each_token_has_the_span_of_its_characters", "count characters")
class CountsBytesInSpans(ByteTokenizer):
    def encode(self, text):
        ids = tuple(text.encode())
        return Encoding(text, ids, tuple((i, i + 1) for i in range(len(ids))))


@tokenizer_caught_by("test_each_token_has_the_span_of_its_characters", "holds its characters")
class ShiftsSpans(ByteTokenizer):
    def encode(self, text):
        found = super().encode(text)
        spans = tuple((max(0, a - 1), b) if b - a == 1 and a else (a, b) for a, b in found.spans)
        return replace(found, spans=spans)


@tokenizer_caught_by("test_marks_of_special_tokens_in_a_text_are_text", "'<eos>' in a caller's text is text")
class TakesMarksForSpecialTokens(ByteTokenizer):
    def encode(self, text):
        if "<eos>" not in text:
            return super().encode(text)
        before, after = text.split("<eos>", 1)
        return Encoding(text, (*before.encode(), EOS, *after.encode()), ())


@tokenizer_caught_by("test_special_tokens_of_a_conversation_come_from_its_template_alone", "in a message is text")
class TakesMarksInMessagesForSpecialTokens(ByteTokenizer):
    def encode_chat(self, chat):
        found = super().encode_chat(chat)
        if (at := found.text.find("<|im_end|>")) < 0:
            return found
        start = len(found.text[:at].encode())
        ids = (*found.ids[:start], EOS, *found.ids[start + 1 :])
        return replace(found, ids=ids)


@tokenizer_caught_by("test_several_threads_may_use_the_tokenizer", "what one gets")
class SharesABuffer(ByteTokenizer):
    buffer = ""

    def encode(self, text):
        self.buffer = text
        time.sleep(0)
        return super().encode(self.buffer)


# --- steps ---------------------------------------------------------------------------------------------------------


def array_of(logits: HostLogits) -> np.ndarray:
    return logits._array


@caught_by("test_the_model_says_what_it_can_hold", "max_chunk > chunk_alignment")
class CutsWhereItCannot(StepModel):
    max_chunk = chunk_alignment = 8


@caught_by("test_logits_are_a_finite_row_for_each_row_that_wants_them", "logits are finite")
class GivesNan(StepModel):
    def step(self, rows):
        logits = super().step(rows)
        array_of(logits)[:, 3] = np.nan
        return logits


@caught_by("test_logits_are_a_finite_row_for_each_row_that_wants_them", "row() is [V] float32")
class PadsTheVocabulary(StepModel):
    def step(self, rows):
        array = array_of(super().step(rows))
        return HostLogits(np.concatenate([array, np.zeros((len(array), 7), np.float32)], axis=1))


@caught_by("test_greedy_top_and_draw_say_what_row_says", "greedy() is the token")
class GreedyIsSecond(StepModel):
    def step(self, rows):
        class Second(HostLogits):
            def greedy(self, rows):
                return np.argsort(self._array, axis=1)[list(rows), -2]

        return Second(array_of(super().step(rows)))


@caught_by("test_greedy_top_and_draw_say_what_row_says", "log_sum_exp is that of the row's logits / 0.5")
class NormalisesWithoutTemperature(StepModel):
    def step(self, rows):
        class Cold(HostLogits):
            def top(self, rows, k, temperature):
                return super().top(rows, k, np.ones_like(temperature))

        return Cold(array_of(super().step(rows)))


@caught_by("test_greedy_top_and_draw_say_what_row_says", "draw() gives the token at which")
class DrawsTheLikeliest(StepModel):
    def step(self, rows):
        class Greedy(HostLogits):
            def draw(self, rows, options):
                return self.greedy(rows)

        return Greedy(array_of(super().step(rows)))


@caught_by("test_greedy_top_and_draw_say_what_row_says", "rows say")
class IgnoresWhatIsWrittenToARow(StepModel):
    def step(self, rows):
        class Copies(HostLogits):
            def row(self, index):
                self.edited = getattr(self, "edited", {})
                return self.edited.setdefault(index, self._array[index].copy())

        return Copies(array_of(super().step(rows)))


@caught_by("test_only_the_rows_that_want_logits_get_them", "4 rows of logits")
class GivesLogitsToAll(StepModel):
    def step(self, rows):
        return super().step([replace(row, num_logits=1) for row in rows])


@caught_by("test_logits_come_in_the_order_of_the_rows", "those of sequences [0, 1, 2, 3]")
class OrdersLogitsBySlot(StepModel):
    def step(self, rows):
        return super().step(sorted(rows, key=lambda row: row.slot))


@caught_by("test_decoding_goes_on_where_the_prompt_ended", "a prompt with a mistake in it")
class ForgetsThePrompt(StepModel):
    def _logits(self, slot):
        tokens = self._slots[slot]
        if len(tokens) > self._prompt_lengths.get(slot, len(tokens)):
            whole, self._slots[slot] = tokens, tokens[-1:]
            logits = super()._logits(slot)
            self._slots[slot] = whole
            return logits
        return super()._logits(slot)


@caught_by("test_a_sequence_gets_the_same_bits_alone_and_in_a_crowd", "whoever runs beside it")
class LooksAtItsNeighbours(StepModel):
    def step(self, rows):
        logits = super().step(rows)
        array_of(logits)[:] += np.float32(1e-5 * (len(rows) - 1))
        return logits


@caught_by("test_a_sequence_gets_the_same_bits_wherever_its_prompt_is_cut", "wherever it is cut")
class DependsOnCuts(StepModel):
    def step(self, rows):
        logits = super().step(rows)
        first = [row.num_cached_tokens == 0 for row in rows if row.num_logits]
        array_of(logits)[np.flatnonzero(first)] += np.float32(1e-5)
        return logits


@caught_by("test_a_released_slot_keeps_no_trace_of_its_sequence", "before it was released")
class KeepsATrace(StepModel):
    def __init__(self):
        super().__init__()
        self.traces = {}

    def release(self, slot):
        self.traces[slot] = self.traces.get(slot, 0) + len(self._slots[slot])
        super().release(slot)

    def _logits(self, slot):
        return super()._logits(slot) + np.float32(1e-4 * self.traces.get(slot, 0))


@caught_by("test_what_happens_to_one_slot_changes_nothing_in_another", "as if alone")
class MixesSlots(StepModel):
    def _logits(self, slot):
        others = sum(len(tokens) for other, tokens in self._slots.items() if other != slot)
        return super()._logits(slot) + np.float32(1e-4 * others) + np.float32(1e-4 * len(self._slots))


@caught_by("test_the_longest_chunk_is_taken", "too long for me")
class RefusesItsLongestChunk(StepModel):
    def step(self, rows):
        if any(len(row.token_ids) == self.max_chunk for row in rows):
            raise BackendError("too long for me")
        return super().step(rows)


@caught_by("test_every_slot_and_every_token_can_be_reserved", "no room")
class HasFewerTokensThanItSays(StepModel):
    def reserve(self, slot, num_tokens):
        if num_tokens > self.num_kv_tokens - 10:
            raise BackendError("no room")
        super().reserve(slot, num_tokens)


@caught_by("test_logits_stay_as_they_are_until_the_next_step", "until the next step")
class LogitsGoWithTheirSlot(StepModel):
    last = None

    def step(self, rows):
        self.last = super().step(rows)
        return self.last

    def release(self, slot):
        super().release(slot)
        if self.last is not None:
            array_of(self.last)[:] = 0


# --- mixtures ------------------------------------------------------------------------------------------------------


@caught_by("test_guesses_get_the_logits_of_tokens_that_come_one_by_one", "a guess behind it")
class GivesGuessesTheSameLogits(StepModel):
    def __init__(self):
        super().__init__(max_drafts=4)

    def _run(self, row):
        logits = super()._run(row)
        return [logits[0]] * len(logits)


@caught_by("test_a_wrong_guess_is_written_over", "where a wrong guess stood")
class KeepsAWrongGuess(StepModel):
    def __init__(self):
        super().__init__(max_drafts=4)

    def _run(self, row):
        wrong = len(self._slots[row.slot]) > row.num_cached_tokens
        return [logits + np.float32(1e-4 * wrong) for logits in super()._run(row)]


@caught_by("test_a_chunk_gets_the_logits_of_as_many_tokens_as_it_wants", "as the last of one")
class ScoresTheLastTokenAlone(StepModel):
    def __init__(self):
        super().__init__(max_scores=16)

    def _run(self, row):
        logits = super()._run(row)
        return logits[-1:] * len(logits)


@caught_by("test_decodes_and_chunks_share_a_step_if_it_says_so", "share a step")
class SaysThatItMixes(StepModel):
    def __init__(self):
        super().__init__(mixes=True)

    def step(self, rows):
        arrays = [array_of(super(SaysThatItMixes, self).step([row])) for row in rows]
        mixed = len({len(row.token_ids) == 1 for row in rows}) > 1
        return HostLogits(np.concatenate(arrays) + np.float32(1e-4 * mixed))


@caught_by("test_tokens_leave_the_same_however_they_came_if_it_is_strict", "declares STRICT")
class DecodesByAnotherKernel(StepModel):
    def step(self, rows):
        decodes = all(len(row.token_ids) == 1 for row in rows)
        return HostLogits(array_of(super().step(rows)) + np.float32(1e-4 * decodes))


# --- prefixes ------------------------------------------------------------------------------------------------------


@caught_by("test_a_copied_beginning_is_as_good_as_one_that_was_run", "after a copied beginning")
class CopiesSomethingElse(StepModel):
    def copy_prefix(self, source, target, num_tokens):
        super().copy_prefix(source, target, num_tokens)
        self._slots[target][0] += 1


@caught_by("test_a_copy_and_its_source_go_their_own_ways", "as if nothing had been")
class SharesWhatItShouldCopy(StepModel):
    def copy_prefix(self, source, target, num_tokens):
        super().copy_prefix(source, target, num_tokens)
        self.copied = source, target

    def release(self, slot):
        super().release(slot)
        if getattr(self, "copied", None) is not None and self.copied[1] == slot:
            self._slots[self.copied[0]][0] += 1
            self.copied = None


@caught_by("test_a_slot_that_was_cut_short_goes_on_from_there", "was cut short")
class KeepsWhatItShouldCut(StepModel):
    cut = frozenset()

    def truncate(self, slot, num_cached_tokens, num_tokens):
        super().truncate(slot, num_cached_tokens, num_tokens)
        self.cut |= {slot}

    def release(self, slot):
        super().release(slot)
        self.cut -= {slot}

    def _logits(self, slot):
        return super()._logits(slot) + np.float32(1e-4 * (slot in self.cut))


@caught_by("test_what_a_slot_gives_up_is_there_for_others", "no room is left")
class GivesNothingUp(StepModel):
    def reserve(self, slot, num_tokens):
        if self.num_reserved_tokens + num_tokens > self.num_kv_tokens:
            raise BackendError("no room is left")
        super().reserve(slot, num_tokens)

    def truncate(self, slot, num_cached_tokens, num_tokens):
        super().truncate(slot, num_cached_tokens, max(num_tokens, self._reserved[slot]))


@caught_by("test_decoded_tokens_are_as_good_as_those_of_chunks_if_it_says_so", "tokens that were decoded")
class DecodesLeaveOtherBits(StepModel):
    def __init__(self):
        super().__init__()
        self.decoded = {}

    def step(self, rows):
        for row in rows:
            if row.num_cached_tokens == 0:
                self.decoded[row.slot] = 0
            elif len(row.token_ids) > 1:
                self.decoded[row.slot] = self.decoded.get(row.slot, 0)
            elif row.num_cached_tokens < self.chunk_alignment:
                self.decoded[row.slot] += 1
        return super().step(rows)

    def _logits(self, slot):
        return super()._logits(slot) + np.float32(1e-4 * self.decoded.get(slot, 0))


# --- streams -------------------------------------------------------------------------------------------------------


@caught_by("test_generate_gives_an_async_generator_that_can_be_closed", "async generator")
class ReturnsAList(FullModel):
    def generate(self, call):
        return [StreamEnd()]


@caught_by("test_a_stream_is_deltas_then_a_finish_then_one_end", "ends with its one StreamEnd")
class DoesNotEnd(FullModel):
    def end(self):
        yield from ()


@caught_by("test_a_stream_is_deltas_then_a_finish_then_one_end", "ends with its one StreamEnd")
class GoesOnAfterTheEnd(FullModel):
    def end(self):
        yield StreamEnd()
        yield Delta(0, "one more thing")


@caught_by("test_a_stream_is_deltas_then_a_finish_then_one_end", "nothing after its ChoiceFinish")
class FinishesTwice(FullModel):
    def ends(self, choice, reason, stop, token):
        yield ChoiceFinish(choice.index, reason, stop, token, choice.seed)
        yield ChoiceFinish(choice.index, reason, stop, token, choice.seed)


@caught_by("test_a_stream_is_deltas_then_a_finish_then_one_end", "has one ChoiceFinish before the StreamEnd")
class NeverFinishes(FullModel):
    def ends(self, choice, reason, stop, token):
        yield from ()


@caught_by("test_a_stream_is_deltas_then_a_finish_then_one_end", "the first delta of each has its id and its name")
class CallsNobody(FullModel):
    def ends(self, choice, reason, stop, token):
        yield Delta(choice.index, "", tool_calls=(ToolCallDelta(0, "call", arguments_json="{}"),))
        yield ChoiceFinish(choice.index, reason, stop, token, choice.seed)


class Makes(FullModel):
    """Makes another kind of choice."""

    kind = Choice

    def make_choice(self, call, index):
        return self.kind(call, index)


@caught_by("test_text_comes_in_whole_characters", "whole characters")
class SplitsCharacters(Makes):
    class kind(Choice):  # noqa: N801  # an attribute
        def text_so_far(self, token):
            return bytes([token]).decode(errors="replace"), None


@caught_by("test_the_text_is_that_of_the_tokens", "are the text of their token_ids")
class LosesTokenIds(FullModel):
    def delta(self, choice, text, token):
        delta = super().delta(choice, text, token)
        return delta if len(choice.tokens) % 3 else replace(delta, token_ids=())


@caught_by("test_an_answer_has_no_more_tokens_than_it_may", "at most call.max_new_tokens")
class GoesOnTooLong(FullModel):
    def may_go_on(self, call, choice):
        return len(choice.tokens) <= call.max_new_tokens


@caught_by("test_an_answer_has_no_more_tokens_than_it_may", "as many if the reason is MAX_TOKENS")
class StopsShort(FullModel):
    def may_go_on(self, call, choice):
        return len(choice.tokens) < max(1, call.max_new_tokens - 1)


@caught_by("test_one_attempt_is_opened_and_completed", "has one attempt")
class OpensNoAttempt(FullModel):
    def begin(self, call):
        attempt = super().begin(call)
        call.meter.attempts.clear()
        return attempt


@caught_by("test_one_attempt_is_opened_and_completed", "has one attempt")
class OpensTwoAttempts(FullModel):
    def begin(self, call):
        super().begin(call)
        return super().begin(call)


@caught_by("test_one_attempt_is_opened_and_completed", "its outcome is COMPLETED")
class HasNoOutcome(FullModel):
    def settle(self, attempt, outcome):
        pass


@caught_by("test_one_attempt_is_opened_and_completed", "the outcome is there when StreamEnd comes")
class SettlesAfterTheEnd(FullModel):
    async def generate(self, call):
        settled = []
        self.settle = lambda attempt, outcome: settled.append((attempt, outcome))
        async for event in super().generate(call):
            yield event
        attempt, attempt.outcome = settled[-1]


@caught_by("test_one_attempt_is_opened_and_completed", "None while it runs")
class IsCompletedFromTheStart(FullModel):
    def begin(self, call):
        attempt = super().begin(call)
        attempt.outcome = AttemptOutcome.COMPLETED
        return attempt


@caught_by("test_usage_equals_the_tokens", "usage.output_tokens is the tokens generated")
class CountsEveryOtherToken(FullModel):
    def __init__(self):
        super().__init__()
        self.seen = 0

    def count(self, attempt):
        self.seen += 1
        attempt.usage.output_tokens += 2 * (self.seen % 2) if self.seen % 3 else 0


@caught_by("test_usage_equals_the_tokens", "usage.input_tokens is the prompt's tokens")
class CountsCharactersOfThePrompt(FullModel):
    def begin(self, call):
        attempt = super().begin(call)
        attempt.usage.input_tokens = len(call.prompt.text) + 1
        return attempt


@caught_by("test_usage_is_written_as_it_happens", "before its delta is yielded")
class CountsAtTheEnd(FullModel):
    def __init__(self):
        super().__init__()
        self.counted = {}

    def count(self, attempt):
        self.counted[id(attempt)] = self.counted.get(id(attempt), 0) + 1

    def settle(self, attempt, outcome):
        attempt.usage.output_tokens = self.counted.get(id(attempt))
        super().settle(attempt, outcome)


@caught_by("test_several_choices_share_one_stream_and_one_input", "once for all choices")
class CountsTheInputForEachChoice(FullModel):
    def begin(self, call):
        attempt = super().begin(call)
        attempt.usage.input_tokens *= call.request.n
        return attempt


@caught_by("test_several_choices_share_one_stream_and_one_input", "has nothing after its ChoiceFinish")
class CallsEveryChoiceTheFirst(FullModel):
    def make_choice(self, call, index):
        return super().make_choice(call, 0)


@caught_by("test_a_prompt_of_one_token_is_answered", "a prompt needs two tokens")
class NeedsTwoTokens(FullModel):
    def fail(self, call):
        if len(call.prompt.token_ids) < 2:
            raise BackendError("a prompt needs two tokens")


# --- options -------------------------------------------------------------------------------------------------------


@caught_by("test_what_is_declared_exists", "'sampling.topk' (meant: 'sampling.top_k'?)")
class DeclaresWhatDoesNotExist(FullModel):
    capabilities = replace(FullModel.capabilities, options=FullModel.capabilities.options | {"sampling.topk"})


@caught_by("test_what_is_declared_exists", "the limit of 'n' is 1 to 16")
class DeclaresChoicesWithoutALimit(FullModel):
    capabilities = replace(FullModel.capabilities, max_n=1)


@caught_by("test_a_stop_sequence_ends_the_text_and_no_part_of_it_leaks", "the text ends before the stop sequence")
class LeaksPartsOfStopSequences(Makes):
    class kind(Choice):  # noqa: N801  # an attribute
        shown = ""

        def text_so_far(self, token):
            new = self.decoder.decode(bytes([token]))
            self.shown += new
            stops = [stop for stop in self.call.request.stopping.stop_sequences if stop in self.shown]
            return (new.removesuffix(stops[0]) if stops else new), (stops or [None])[0]


@caught_by("test_what_only_begins_like_a_stop_sequence_is_shown", "held back no longer")
class LosesWhatItHeldBack(Makes):
    class kind(Choice):  # noqa: N801  # an attribute
        def rest(self):
            return self.decoder.decode(b"", final=True)


@caught_by("test_a_stop_token_ends_the_choice", "ends with its first stop token")
class IgnoresStopTokens(FullModel):
    async def run(self, call, attempt, choice):
        object.__setattr__(call.request.stopping, "stop_token_ids", ())
        async for event in super().run(call, attempt, choice):
            yield event


@caught_by("test_an_answer_has_no_fewer_tokens_than_it_must", "at least min_new_tokens")
class EndsWhenItLikes(FullModel):
    def may_go_on(self, call, choice):
        return len(choice.tokens) < min(3, call.max_new_tokens)


@caught_by("test_a_seed_repeats_its_answer_and_seeds_differ", "the same answer")
class IgnoresTheSeed(Makes):
    class kind(Choice):  # noqa: N801  # an attribute
        def __init__(self, call, index):
            super().__init__(call, index)
            self.random = np.random.default_rng()


@caught_by("test_a_seed_repeats_its_answer_and_seeds_differ", "seeds make a difference")
class HasOneSeedForAll(Makes):
    class kind(Choice):  # noqa: N801  # an attribute
        def __init__(self, call, index):
            super().__init__(call, index)
            self.random = np.random.default_rng(1)


@caught_by("test_one_candidate_is_the_greedy_choice", "top_k = 1 is greedy")
class IgnoresTopK(Makes):
    class kind(Choice):  # noqa: N801  # an attribute
        def __init__(self, call, index):
            super().__init__(call, index)
            self.hot = bool(call.request.sampling.temperature)


@caught_by("test_a_bias_makes_a_token_come", "makes it the likeliest")
class IgnoresTheBias(Makes):
    class kind(Choice):  # noqa: N801  # an attribute
        def next_token(self):
            return self.script[0]


@caught_by("test_each_token_has_its_logprob", "at most 0")
class GivesProbabilities(FullModel):
    def delta(self, choice, text, token):
        delta = super().delta(choice, text, token)
        return replace(delta, logprobs=tuple(replace(entry, logprob=0.9) for entry in delta.logprobs))


@caught_by("test_each_token_has_its_logprob", "each output token has its TokenLogprob")
class GivesLogprobsForSome(FullModel):
    def delta(self, choice, text, token):
        delta = super().delta(choice, text, token)
        return delta if len(choice.tokens) % 2 else replace(delta, logprobs=())


# --- endings -------------------------------------------------------------------------------------------------------


@caught_by("test_closing_a_stream_midway_ends_the_call_at_once", "the attempt's outcome is CANCELLED")
class CallsEverythingCompleted(FullModel):
    def settle(self, attempt, outcome):
        super().settle(attempt, AttemptOutcome.COMPLETED)


@caught_by("test_closing_a_stream_midway_ends_the_call_at_once", "ends a call within 0.1 s", cancel_seconds=0.1)
class ThinksAboutBeingClosed(FullModel):
    async def generate(self, call):
        try:
            async for event in super().generate(call):
                yield event
        finally:
            await asyncio.sleep(0.2)


@caught_by("test_closing_a_stream_midway_ends_the_call_at_once", "what a cancelled call used is known")
class ForgetsWhatWasUsed(FullModel):
    def settle(self, attempt, outcome):
        if outcome is AttemptOutcome.CANCELLED:
            attempt.usage.output_tokens = 0
        super().settle(attempt, outcome)


@caught_by("test_cancelling_a_call_ends_it_at_once", "CancelledError is not swallowed")
class SwallowsCancels(FullModel):
    async def think(self):
        with contextlib.suppress(asyncio.CancelledError):
            await super().think()


@caught_by("test_nothing_goes_on_after_a_cancel", "nothing is generated")
class KeepsGenerating(FullModel):
    """In a thread, which no look at tasks finds."""

    def begin(self, call):
        attempt = super().begin(call)

        def generate():
            for _ in range(100):
                time.sleep(0.01)
                attempt.usage.output_tokens += 1

        threading.Thread(target=generate, daemon=True).start()
        return attempt


@caught_by("test_nothing_goes_on_after_a_cancel", "a call's tasks end with it")
class LeavesATask(FullModel):
    async def think(self):
        self.pump = asyncio.create_task(asyncio.sleep(60), name="pump")
        await super().think()


@caught_by("test_the_next_call_is_none_the_worse_for_a_cancel", "a call after a cancel")
class IsConfusedByACancel(FullModel):
    confused = False

    def make_choice(self, call, index):
        choice = super().make_choice(call, index)
        if self.confused:
            choice.script = b"where was I?"
        return choice

    def settle(self, attempt, outcome):
        self.confused |= outcome is AttemptOutcome.CANCELLED
        super().settle(attempt, outcome)


@caught_by("test_a_failing_call_ends_with_a_typed_error", "ValueError: bad byte")
class RaisesABareError(FullModel):
    def fail(self, call):
        if "\0" in call.prompt.text:
            raise ValueError("bad byte")


@caught_by("test_a_failing_call_ends_with_a_typed_error", "the outcome of a call that fails is FAILED")
class CallsAFailureACancel(FullModel):
    def settle(self, attempt, outcome):
        super().settle(attempt, AttemptOutcome.CANCELLED if outcome is AttemptOutcome.FAILED else outcome)


@caught_by("test_an_error_tells_nothing_of_the_server", "no path of the server")
class TellsAPath(FullModel):
    def fail(self, call):
        if "\0" in call.prompt.text:
            raise BackendError(f"{Path.cwd()}/model.bin: bad byte")


@caught_by("test_the_next_call_is_none_the_worse_for_an_error", "a call after an error")
class IsConfusedByAnError(IsConfusedByACancel):
    def settle(self, attempt, outcome):
        self.confused |= outcome is AttemptOutcome.FAILED
        FullModel.settle(self, attempt, outcome)


@caught_by("test_a_call_ends_at_its_deadline", "or raises DeadlineExceeded")
class RaisesTimeoutError(FullModel):
    async def think(self):
        await super().think()
        raise TimeoutError


@caught_by("test_a_call_ends_at_its_deadline", "within 0.1 s of its deadline", cancel_seconds=0.1)
class TakesItsTimeAtTheDeadline(ThinksAboutBeingClosed):
    pass


@caught_by("test_a_time_limit_gives_the_text_so_far", "ends with TIME_LIMIT")
class IgnoresTheTimeLimit(FullModel):
    def is_late(self, call):
        return False


@caught_by("test_a_time_limit_can_be_an_error", "raises DeadlineExceeded at its time limit")
class IsNeverAnError(FullModel):
    async def run(self, call, attempt, choice):
        yield Delta(0, "a", (97,))
        yield ChoiceFinish(0, FinishReason.TIME_LIMIT)


# --- crowds --------------------------------------------------------------------------------------------------------


@caught_by("test_the_same_call_gets_the_same_answer", "the same answer every time")
class ChangesItsMind(FullModel):
    num_calls = 0

    def make_choice(self, call, index):
        self.num_calls += 1
        choice = super().make_choice(call, index)
        choice.script = ANSWERS[self.num_calls % 3].encode()
        return choice


@caught_by("test_calls_at_the_same_time_get_what_each_gets_alone", "beside 7 other calls")
class MixesCalls(FullModel):
    def make_choice(self, call, index):
        self.script = super().make_choice(call, index).script
        choice = super().make_choice(call, index)
        choice.next_token = lambda: self.script[len(choice.tokens) % len(self.script)]
        return choice


@caught_by("test_the_event_loop_goes_on_during_a_call", "never blocks the event loop")
class BlocksTheEventLoop(FullModel):
    async def think(self):
        time.sleep(0.06)  # noqa: ASYNC251  # that is what is wrong with it

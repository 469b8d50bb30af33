"""A backend for headrace around llama-cpp-python: ``python server.py MODEL.gguf [CONTEXT_LENGTH]``."""

# ruff: noqa: ANN001, ANN201, ANN204, ARG002, N802  # grpc's methods

import codecs
import ctypes
import os
import random
import re
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import llama_cpp
from llama_cpp.llama_chat_format import Jinja2ChatFormatter

from headrace.backend.v1 import backend_pb2 as pb
from headrace.backend.v1 import backend_pb2_grpc
from headrace.v1.generation_pb2 import ChoiceFinish, Delta, Role
from headrace.v1.tokenization_pb2 import Token
from headrace.v1.usage_pb2 import Usage

MAX_CALLS = 16  # one runs, the others wait
OPTIONS = ["text", "token_ids.ids", "sampling.temperature", "sampling.top_k", "sampling.top_p", "response.token_ids"]
OPTIONS += ["stopping.max_new_tokens", "stopping.stop_sequences", "determinism.seed"]
CHAT_OPTIONS = ["chat.messages.role", "chat.messages.content.text", "chat.add_generation_prompt"]


class Backend(backend_pb2_grpc.BackendServiceServicer):
    def __init__(self, path, context_length):
        self.path, self.context_length, self.llama = path, context_length, None
        self.places, self.turn = threading.BoundedSemaphore(MAX_CALLS), threading.Lock()
        self.reader = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)  # tokenizer and metadata alone
        self.vocabulary = llama_cpp.llama_model_get_vocab(self.reader.model)
        self.ends = {i for i in range(self.reader.n_vocab()) if llama_cpp.llama_vocab_is_eog(self.vocabulary, i)}
        self.template = self.reader.metadata.get("tokenizer.chat_template")

    def Describe(self, request, context):
        model = pb.Model(
            name=self.path.stem.lower(),
            context_length=self.context_length,
            options=OPTIONS + (CHAT_OPTIONS if self.template else []),
            tokenizer=pb.Tokenizer(vocabulary_size=self.reader.n_vocab(), eos_token_ids=self.ends),
        )
        return pb.DescribeResponse(contract_version=pb.ContractVersion(major=1, minor=0), models=[model])

    def LoadModel(self, request, context):
        with self.turn:
            self.llama = self.llama or llama_cpp.Llama(str(self.path), n_ctx=self.context_length, verbose=False)
        return pb.LoadModelResponse()

    def UnloadModel(self, request, context):
        with self.turn:
            self.llama = None
        return pb.UnloadModelResponse()

    def Generate(self, request, context):
        if not self.places.acquire(blocking=False):
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, f"{MAX_CALLS} calls are running or waiting")
        try:
            with self.turn:
                if self.llama is None:
                    context.abort(grpc.StatusCode.FAILED_PRECONDITION, "the model is not loaded")
                yield from self.answer(request.spec)  # left where it stands when the caller goes away
        finally:
            self.places.release()

    def answer(self, spec):
        usage = Usage(input_tokens=len(spec.token_ids.ids), output_tokens=0)
        yield pb.GenerateResponse(usage=usage)
        seed = spec.determinism.seed if spec.determinism.HasField("seed") else random.getrandbits(32)
        self.llama.reset()  # or a prompt that begins as the last one did would be quicker, whoever sent that
        self.llama.set_seed(seed % 2**32)
        temp, top_k = spec.sampling.temperature, spec.sampling.top_k  # 0, greedy, and 0, all, if they are unset
        top_p = spec.sampling.top_p if spec.sampling.HasField("top_p") else 1.0
        decoder, held, stop, token = codecs.getincrementaldecoder("utf-8")("replace"), "", None, None
        for token in self.llama.generate(spec.token_ids.ids, temp=temp, top_k=top_k, top_p=top_p, min_p=0.0):
            usage.output_tokens += 1
            done = token in self.ends or usage.output_tokens == spec.stopping.max_new_tokens
            held += decoder.decode(self.piece(token), final=done)
            text, held, stop = split(held, spec.stopping.stop_sequences, final=done)
            yield pb.GenerateResponse(usage=usage, delta=Delta(text=text, token_ids=[token]))
            if done or stop is not None:
                break
        reason = "STOP_SEQUENCE" if stop is not None else "EOS_TOKEN" if token in self.ends else "MAX_TOKENS"
        end = token if reason == "EOS_TOKEN" else None
        finish = ChoiceFinish(reason=f"FINISH_REASON_{reason}", stop_sequence=stop, stop_token_id=end, seed=seed)
        yield pb.GenerateResponse(finish=finish)

    def Tokenize(self, request, context):
        if request.HasField("text"):
            ids, text = self.reader.tokenize(request.text.encode(), add_bos=True, special=False), request.text
            begins = int(ids[:1] == [self.reader.token_bos()])  # it stands for no character
        elif self.template:
            ids, text, begins = [], "", 0
            for part, special in self.lay_out(request.chat, context):
                ids += self.reader.tokenize(part.encode(), add_bos=False, special=special)
                text += part
        else:
            context.abort(grpc.StatusCode.UNIMPLEMENTED, "the model has no chat template")
        # Some vocabularies begin a text with a space that is not there.
        lengths = [0] * begins + [len(self.piece(i, special=True)) for i in ids[begins:]]
        at, tokens = min(0, len(text.encode()) - sum(lengths)), []
        for i, length in zip(ids, lengths, strict=True):
            tokens.append(Token(id=i, bytes=self.piece(i), start=max(0, at), end=at + length))
            at += length
        return pb.TokenizeResponse(tokens=tokens, text=text)

    def lay_out(self, chat, context):
        """The parts of a conversation; special tokens are looked for in those of the template alone."""
        texts = ["".join(part.text for part in turn.content) for turn in chat.messages]
        roles = [Role.Name(turn.role).removeprefix("ROLE_").lower() for turn in chat.messages]
        messages = [{"role": role, "content": f"\ue000{i}\ue001"} for i, role in enumerate(roles)]
        bos, eos = (self.piece(i, special=True).decode() for i in (self.reader.token_bos(), self.reader.token_eos()))
        try:
            lay_out = Jinja2ChatFormatter(self.template, eos, bos, chat.add_generation_prompt)
            parts = re.split("\ue000([0-9]+)\ue001", lay_out(messages=messages).prompt)
        except ValueError as error:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"chat: {error}")
        yield from ((texts[int(part)], False) if i % 2 else (part, True) for i, part in enumerate(parts) if part)

    def Detokenize(self, request, context):
        text = b"".join(self.piece(i, special=not request.skip_special_tokens) for i in request.token_ids)
        return pb.DetokenizeResponse(text=text.decode(errors="replace"), token_bytes=map(self.piece, request.token_ids))

    def piece(self, token, special=False):
        buffer = ctypes.create_string_buffer(512)
        size = llama_cpp.llama_token_to_piece(self.vocabulary, token, buffer, len(buffer), 0, special)
        return buffer.raw[:size]


def split(text, stops, final):
    """What can be shown of a text, what has to wait because a stop sequence may begin in it, and the one it has."""
    if found := [stop for stop in stops if stop in text]:
        stop = min(found, key=text.index)
        return text[: text.index(stop)], "", stop
    kept = 0 if final else max((n for stop in stops for n in range(len(stop)) if text.endswith(stop[:n])), default=0)
    return text[: len(text) - kept], text[len(text) - kept :], None


if __name__ == "__main__":
    backend = Backend(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 4096)
    server = grpc.server(ThreadPoolExecutor(MAX_CALLS + 4))  # some are left for everything but Generate
    backend_pb2_grpc.add_BackendServiceServicer_to_server(backend, server)
    server.add_insecure_port(os.environ["HEADRACE_BACKEND_ADDRESS"])
    server.start()
    server.wait_for_termination()

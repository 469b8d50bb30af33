"""Keeps a worker running, or finds it running, and brings its models back after a crash."""

from __future__ import annotations

import contextlib
import random
import re
import threading
import time
from collections import Counter
from dataclasses import dataclass
from typing import cast

import grpc
import structlog
from pydantic import BaseModel, ConfigDict, DirectoryPath, Field, ValidationInfo, field_validator

from headrace.backend.v1 import backend_pb2 as pb
from headrace.backends.errors import BackendError, BackendUnavailable
from headrace.backends.process.connection import CONTRACT, QUICK_SECONDS, Connection, status_of
from headrace.backends.process.messages import to_card
from headrace.backends.process.process import WorkerProcess

_WATCH_SECONDS = 1.0
"""Between two looks at a worker's health."""
_POLL_SECONDS = 0.05
"""Between two tries at a worker that does not listen yet."""
_STABLE_SECONDS = 30.0
"""A worker that served as long as this is started again at once."""
_FIRST_DELAY = 0.2
"""Seconds before the second try to start a worker again; doubled for each further one."""
_CRASH_SECONDS = 1.0
"""For a process to end whose connection has ended."""


class WorkerOptions(BaseModel):
    """``[backends.process.workers.<name>]``: a worker to start, or one that runs already."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    command: tuple[str, ...] | None = Field(None, min_length=1)
    """Program and arguments. It listens on the address in the environment variable HEADRACE_BACKEND_ADDRESS."""
    address: str | None = Field(None, validate_default=True)
    """Where a worker listens that the server does not start: ``unix:/PATH`` or ``HOST:PORT``."""
    environment: dict[str, str] = Field(default_factory=dict, repr=False)  # it may hold secrets
    """Added to the server's own environment."""
    cwd: DirectoryPath | None = None
    """Folder that it runs in; by default the server's."""
    start_timeout: float = Field(30.0, gt=0)
    """Seconds until it must answer."""
    load_timeout: float = Field(600.0, gt=0)
    """Seconds that loading a model may take."""
    stop_grace: float = Field(5.0, ge=0)
    """Seconds from SIGTERM to SIGKILL."""
    max_restart_delay: float = Field(30.0, ge=0)
    """Seconds between two tries to start it again, at most."""

    @field_validator("address")
    @classmethod
    def _one_of_two(cls, address: str | None, info: ValidationInfo) -> str | None:
        if (address is None) == (info.data.get("command") is None):
            raise ValueError("there must be either a command or an address")
        if address is not None and not re.fullmatch(r"unix:/.+|[^/]+:\d{1,5}", address):
            raise ValueError("must be unix:/PATH or HOST:PORT")
        return address


@dataclass(frozen=True, slots=True)
class _Session:
    """One life of a worker: from its start, or from being found, until it is lost."""

    connection: Connection
    process: WorkerProcess | None

    def exit(self, wait: float = 0) -> str | None:
        return self.process.exit(wait) if self.process else None


class Worker:
    """One worker, from ``models`` or ``load`` until its last model is unloaded, or until ``stop``.

    A thread of its own watches it. ``connection``, ``problem`` and ``look`` return at once; the others block.
    """

    def __init__(self, name: str, options: WorkerOptions) -> None:
        self.name = name
        self._options = options
        self._log = structlog.get_logger("headrace.backends.process")
        self._lock = threading.RLock()
        """Held while it is started and while models are loaded and unloaded."""
        self._thread: threading.Thread | None = None
        self._stopping = threading.Event()
        self._look_now = threading.Event()
        self._session: _Session | None = None
        self._problem: str | None = None
        """Of the session, or why there is none."""
        self._forgetful = False
        """Whether it says that it has not loaded what it had: it was restarted behind our back."""
        self._models: dict[str, pb.Model] = {}
        self._loaded: dict[str, pb.Model] = {}
        """As they were when they were loaded."""
        self._num_users: Counter[str] = Counter()
        """How often each is loaded here: once in the worker."""

    def models(self) -> dict[str, pb.Model]:
        """What it offers, by name; starts it if it does not run. Raises BackendError."""
        with self._lock:
            if self._thread is None:
                self._stopping.clear()
                session = self._open()
                self._thread = threading.Thread(
                    target=self._watch, args=(session,), name=f"worker {self.name}", daemon=True
                )
                self._thread.start()
            return self._models

    def load(self, name: str) -> pb.Model:
        """Loads one of ``models``. Raises BackendError."""
        with self._lock:
            models = self.models()
            if name not in models:
                raise BackendError(self._say(f"has no model {name!r}"))
            if name not in self._loaded:
                self._load(self.connection(), name)
                self._loaded[name] = models[name]
            self._num_users[name] += 1
            return self._loaded[name]

    def unload(self, name: str) -> None:
        """Takes a ``load`` back. The last one frees the model, and ends the worker if it was its last model."""
        with self._lock:
            self._num_users[name] -= 1
            if self._num_users[name]:
                return
            del self._loaded[name]
            # What a worker holds that is away goes with it. ValueError is grpc's for a connection that was just closed.
            with contextlib.suppress(BackendUnavailable, grpc.RpcError, ValueError):
                self.connection().unload_model(pb.UnloadModelRequest(model=name), timeout=QUICK_SECONDS)
            last = not self._loaded
        if last:
            self.stop()

    def stop(self) -> None:
        """Ends it; one that was found running is only let go."""
        self._stopping.set()
        self._look_now.set()
        if (thread := self._thread) and thread is not threading.current_thread():  # a finalizer may run in any
            thread.join()
            self._thread = None

    def connection(self) -> Connection:
        """The way to it. Raises BackendUnavailable while it is away."""
        session = self._session
        if session is None:
            raise BackendUnavailable(self._say("is not running; try again"))
        return session.connection

    def problem(self, model: str) -> str | None:
        """Why a loaded model cannot serve now, if it cannot; for the operator."""
        session = self._session
        exit_ = session and session.exit()
        problem = self._say(exit_) if exit_ else self._problem
        if problem is None and self._models.get(model) != self._loaded.get(model):
            problem = self._say(f"has another model {model!r} than was loaded; restart the server to take it")
        return problem

    def look(self, *, forgetful: bool = False) -> None:
        """A call has failed: look at it now."""
        self._forgetful = self._forgetful or forgetful
        self._look_now.set()

    # --- starting

    def _open(self) -> _Session:
        """Starts or finds it, and loads again what was loaded. Raises BackendError."""
        options = self._options
        with contextlib.ExitStack() as undo:
            process = None
            if options.command:
                try:
                    process = WorkerProcess(self.name, options.command, options.environment, options.cwd)
                except OSError as error:
                    raise BackendError(self._say(f"cannot be started: {error}")) from error
                undo.callback(process.close, options.stop_grace)
            connection = Connection(process.address if process else cast(str, options.address))
            undo.callback(connection.close)
            session = _Session(connection, process)
            self._models = self._check(self._describe(session))
            self._forgetful = False
            for name, model in self._loaded.items():
                if self._models.get(name) == model:
                    self._load(connection, name)
            undo.pop_all()
        self._session, self._problem = session, None
        return session

    def _describe(self, session: _Session) -> pb.DescribeResponse:
        """Asks until it answers."""
        timeout = self._options.start_timeout
        deadline = time.monotonic() + timeout
        while True:
            left = max(_POLL_SECONDS, deadline - time.monotonic())
            try:
                return session.connection.describe(left)
            except grpc.RpcError as error:
                code, text = status_of(error)
                if exit_ := session.exit():
                    raise BackendError(self._say(exit_)) from error
                if code not in {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED}:
                    raise BackendError(self._say(f"answers Describe with {code.name}: {text}")) from error
                if left <= _POLL_SECONDS:
                    raise BackendError(self._say(f"did not answer within {timeout:g} s: {text}")) from error
            if self._stopping.wait(_POLL_SECONDS):
                raise BackendError(self._say("is being stopped"))

    def _check(self, answer: pb.DescribeResponse) -> dict[str, pb.Model]:
        version = answer.contract_version.major, answer.contract_version.minor
        if version[0] != CONTRACT[0] or version > CONTRACT:
            theirs, ours = (f"{major}.{minor}" for major, minor in (version, CONTRACT))
            raise BackendError(self._say(f"speaks version {theirs} of the contract, this server {ours}"))
        models = {model.name: model for model in answer.models}
        if not models or len(models) < len(answer.models):
            raise BackendError(self._say("offers two models of one name" if models else "offers no model"))
        for model in answer.models:
            try:
                to_card(model)
            except BackendError as error:
                raise BackendError(self._say(f"describes what cannot be: {error.message}")) from None
        self._log.info("worker_found", worker=self.name, software=answer.software, models=list(models))
        return models

    def _load(self, connection: Connection, name: str) -> None:
        loading = connection.load_model.future(pb.LoadModelRequest(model=name), timeout=self._options.load_timeout)
        while not loading.done():
            if self._stopping.wait(_POLL_SECONDS):
                loading.cancel()
                raise BackendError(self._say("is being stopped"))
        try:
            loading.result()
        except grpc.RpcError as error:
            code, text = status_of(error)
            raise BackendError(self._say(f"could not load model {name!r}: {code.name}: {text}")) from error

    def _say(self, what: str) -> str:
        return f"worker {self.name!r} {what}"

    # --- the thread

    def _watch(self, session: _Session) -> None:
        failures = 0
        while True:
            began = time.monotonic()
            reason = self._serve(session)
            self._session, self._problem = None, reason
            session.connection.close()
            if session.process:
                session.process.close(self._options.stop_grace)
            if self._stopping.is_set():
                return
            self._log.warning("worker_lost", worker=self.name, reason=reason)
            failures = 0 if time.monotonic() - began >= _STABLE_SECONDS else failures + 1
            while True:
                if self._stopping.wait(self._delay(failures)):
                    return
                try:
                    with self._lock:
                        session = self._open()
                    break
                except Exception as error:  # noqa: BLE001  # whatever it is, it may pass
                    failures += 1
                    self._problem = str(error)
                    self._log.warning("worker_not_back", worker=self.name, reason=self._problem)

    def _serve(self, session: _Session) -> str:
        """Watches it until it is lost or to be stopped; says why."""
        while True:
            self._look_now.wait(_WATCH_SECONDS)
            self._look_now.clear()
            if self._stopping.is_set():
                return self._say("is not running")
            if exit_ := session.exit():
                return self._say(exit_)
            if self._forgetful:
                return self._say("has not loaded what it had; it was restarted")
            try:
                problem = session.connection.problem()
                self._problem = problem and self._say(problem)
            except grpc.RpcError as error:
                code, text = status_of(error)
                if code is grpc.StatusCode.UNAVAILABLE:
                    # A crash: the connection ends a moment before the process does.
                    return self._say(session.exit(_CRASH_SECONDS) or f"cannot be reached: {text}")
                self._problem = self._say(f"answers its health check with {code.name}: {text}")

    def _delay(self, failures: int) -> float:
        """Doubled with each failure, and spread, so that many workers do not start at once."""
        if failures == 0:
            return 0.0
        longest = min(self._options.max_restart_delay, _FIRST_DELAY * 2.0 ** min(failures - 1, 16))
        return longest * random.uniform(0.5, 1)  # noqa: S311  # no secret

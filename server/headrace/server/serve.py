"""Runs the server from start to a clean end."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Callable, Iterator

import grpc
import structlog
from prometheus_client import CollectorRegistry

from headrace.server.app import App, opened_ledger
from headrace.server.config import Authentication, Settings, SettingsError, is_loopback
from headrace.server.engine.engine import Engine
from headrace.server.metrics import Metrics, serve_metrics
from headrace.server.middleware.authentication import Authenticates
from headrace.server.rpc.server import RunningServer, start_server
from headrace.server.tls import server_credentials

_WATCH_SECONDS = 1.0
"""Between two looks at the models' health."""


async def serve(
    settings: Settings,
    *,
    authenticator: Authenticates | None = None,
    on_ready: Callable[[int], None] | None = None,
) -> None:
    """Serves until SIGTERM or SIGINT, then drains: health says NOT_SERVING, new calls are refused, running ones get
    ``settings.shutdown_grace`` seconds to end and are then finished with what they have. A second signal ends the
    grace.

    With ``settings.reuse_port`` it listens once the models are loaded; otherwise health checks can watch them load.

    ``on_ready`` gets the port once the models are loaded. Raises SettingsError, PluginError, or OSError for an address.
    """
    log = structlog.get_logger("headrace.server")
    credentials = server_credentials(settings)
    check_exposure(settings, authenticated=authenticator is not None)
    metrics = Metrics(CollectorRegistry())
    signals = _Signals()
    async with contextlib.AsyncExitStack() as cleanup:
        # First in, so last out: the second signal comes while the others are being undone.
        cleanup.enter_context(signals.installed())
        ledger = await cleanup.enter_async_context(opened_ledger(settings))
        app = App(settings, ledger=ledger, authenticator=authenticator)
        cleanup.push_async_callback(app.close)
        for plugin in app.plugins:
            provides = [f"{kind} {name}" for kind, name in plugin.provides()]
            log.info(
                "plugin_loaded", plugin=plugin.name, package=plugin.package, version=plugin.version, provides=provides
            )
        app.offers()  # what is wrong with the models is said before anything listens
        await _run(app, settings, credentials, metrics, signals, cleanup, on_ready)
        log.info("stopping", grace=settings.shutdown_grace)
    log.info("stopped")


def check_exposure(settings: Settings, *, authenticated: bool = False) -> None:
    """Warns of what anybody could use. Raises SettingsError if others than this machine could, unless the operator has
    said that they may. ``authenticated``: by something that is not in the settings.
    """
    authenticated = (
        authenticated
        or settings.authentication is not Authentication.ANONYMOUS
        or bool(settings.authenticators)
        # Whoever has a certificate of these authorities is no stranger.
        or settings.tls_client_ca is not None
    )
    log = structlog.get_logger("headrace.server")
    if is_loopback(settings.listen):
        if not authenticated:
            log.warning("open_to_this_machine", address=settings.listen, hint="anybody on this machine can use it")
        return
    missing = [
        *(() if settings.tls_certificate else ("TLS (tls_certificate, tls_key)",)),
        *(() if authenticated else ("authentication (authentication = keys, or tls_client_ca)",)),
    ]
    if not missing:
        return
    if not settings.insecure:
        raise SettingsError(
            f"listen: {settings.listen} can be reached from other machines, which needs {' and '.join(missing)};"
            " set insecure = true if something in front of this server sees to that"
        )
    hint = "anybody who reaches it can use it" if not authenticated else "whoever is on the way can read it"
    log.warning("open_to_the_network", address=settings.listen, without=missing, hint=hint)


async def _run(
    app: App,
    settings: Settings,
    credentials: grpc.ServerCredentials | None,
    metrics: Metrics,
    signals: _Signals,
    cleanup: contextlib.AsyncExitStack,
    on_ready: Callable[[int], None] | None,
) -> None:
    """Listens and loads, and returns when the first signal comes; what there is to undo is in ``cleanup``."""
    log = structlog.get_logger("headrace.server")
    if settings.reuse_port:
        # Connections come to any that listens: whatever can fail or takes time is over before this one does.
        metrics_port = _serve_metrics(settings, metrics, cleanup)
        await _load(app, signals, cleanup)
        if signals.first.is_set():
            return
        server = await _listen(app, settings, credentials, metrics, signals, cleanup)
    else:
        server = await _listen(app, settings, credentials, metrics, signals, cleanup)
        metrics_port = _serve_metrics(settings, metrics, cleanup)
    log.info("listening", address=settings.listen, port=server.port, metrics_port=metrics_port)
    if not settings.reuse_port:
        await _load(app, signals, cleanup)
        if signals.first.is_set():
            return
    _announce(app, server, metrics)
    metrics.observe_ledger(open_holds=app.num_open_holds, unsent_events=app.num_unsent_events)
    metrics.observe_response_cache(num_bytes=app.num_cached_bytes, failures=app.num_cache_failures)
    if on_ready:
        on_ready(server.port)
    watching = asyncio.create_task(_watch(app, server))
    cleanup.callback(watching.cancel)
    await signals.first.wait()


class _Signals:
    """SIGTERM and SIGINT as events: the first, and the second for those in a hurry."""

    def __init__(self) -> None:
        self.first, self.second = asyncio.Event(), asyncio.Event()

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._received)
        try:
            yield
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)

    def _received(self) -> None:
        (self.second if self.first.is_set() else self.first).set()


async def _listen(
    app: App,
    settings: Settings,
    credentials: grpc.ServerCredentials | None,
    metrics: Metrics,
    signals: _Signals,
    cleanup: contextlib.AsyncExitStack,
) -> RunningServer:
    server = await start_server(
        app,
        address=settings.listen,
        metrics=metrics,
        max_message_bytes=settings.max_message_bytes,
        max_batch_in_flight=settings.max_batch_in_flight,
        resume_window=settings.resume_window,
        resume_max_bytes=settings.resume_max_bytes,
        credentials=credentials,
        reuse_port=settings.reuse_port,
        serving=False,
    )
    cleanup.push_async_callback(_drain, app, server, settings, signals)
    return server


async def _load(app: App, signals: _Signals, cleanup: contextlib.AsyncExitStack) -> None:
    """Loads the models; returns sooner if a signal comes, and what is being loaded then ends in ``cleanup``."""
    loading = asyncio.create_task(app.load())
    cleanup.push_async_callback(asyncio.wait, [loading])
    stopping = asyncio.create_task(signals.first.wait())
    await asyncio.wait([loading, stopping], return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if loading.done():
        await loading


def _announce(app: App, server: RunningServer, metrics: Metrics) -> None:
    """Tells health checks and metrics of the models, which are loaded."""
    for served in app.registry:
        server.health.set_model_serving(served.card.name, served.problem() is None)
        if served.engine:
            _observe(served.engine, metrics)
    for route in app.router.names(None):
        server.health.set_model_serving(route, app.router.problem(route) is None)
    metrics.observe_routes(tries=app.router.tries, fallbacks=app.router.fallbacks, states=app.router.states)
    server.set_serving(any(served.problem() is None for served in app.registry))


async def _watch(app: App, server: RunningServer) -> None:
    """Asks the models how they are, and tells health checks and the log what is wrong, and what has changed."""
    log = structlog.get_logger("headrace.models")
    seen: dict[str, str | None] = {}
    while True:
        for name, problem in _problems(app):
            if problem == seen.get(name):
                continue
            seen[name] = problem
            server.health.set_model_serving(name, problem is None)
            server.set_serving(any(served.problem() is None for served in app.registry))
            if problem is None:
                log.info("model_recovered", model=name)
            else:
                log.warning("model_unhealthy", model=name, problem=problem)
        await asyncio.sleep(_WATCH_SECONDS)


def _problems(app: App) -> Iterator[tuple[str, str | None]]:
    """Of each model, and of each route none of whose models serves."""
    for served in app.registry:
        yield served.card.name, served.problem()
    for route in app.router.names(None):
        yield route, app.router.problem(route)


def _observe(engine: Engine, metrics: Metrics) -> None:
    metrics.observe_engine(
        engine.model.card.name,
        queued=lambda: engine.num_queued,
        running=lambda: engine.runner.num_running,
        kv_utilization=lambda: engine.runner.kv_utilization,
        retained_tokens=lambda: engine.runner.num_retained_tokens,
        looked_up_tokens=lambda: engine.runner.num_looked_up_tokens,
        reused_tokens=lambda: engine.runner.num_reused_tokens,
        preemptions=lambda: engine.runner.num_preemptions,
    )


async def _drain(app: App, server: RunningServer, settings: Settings, signals: _Signals) -> None:
    app.draining = True
    stop = asyncio.create_task(server.stop(settings.shutdown_grace, app.finish_all))
    hurry = asyncio.create_task(signals.second.wait())
    await asyncio.wait([stop, hurry], return_when=asyncio.FIRST_COMPLETED)
    if not stop.done():
        await app.finish_all()
    hurry.cancel()
    await stop


def _serve_metrics(settings: Settings, metrics: Metrics, cleanup: contextlib.AsyncExitStack) -> int | None:
    """The port of the endpoint, if there is one."""
    if settings.metrics_listen is None:
        return None
    host, _, port = settings.metrics_listen.rpartition(":")
    try:
        endpoint = serve_metrics(metrics, host=host.strip("[]"), port=int(port))
    except OSError as error:
        raise OSError(f"metrics_listen: cannot listen on {settings.metrics_listen}: {error.strerror}") from error
    cleanup.callback(endpoint.close)
    return endpoint.port

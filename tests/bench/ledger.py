"""Measures the ledger: calls a second, and how long a call waits for its hold, alone and beside others.

A call is a hold, a note and a settlement; the next one begins when the hold is durable, as a server's does. Limit:
1,000 calls/s with 64 at once, 2 ms for a hold alone (p50). Each round makes a new ledger in the same place; what it
tells is as much the disk's as the ledger's.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import machine
from figures import percentile, with_interval
from sqlalchemy import Connection, event

from headrace.backends.components import Price
from headrace.backends.usage import AttemptOutcome, Cost, Usage
from headrace.server.accounting.charges import WorstCase
from headrace.server.accounting.ledger import Ledger
from headrace.server.accounting.records import Account, Allowance, HoldRequest, Settlement

_PRICE = Price(id="bench", currency="USD", input_nanos=20_000_000, output_nanos=80_000_000)
_USAGE = Usage(input_tokens=100, output_tokens=64)
_COST = Cost(currency="USD", charge_nanos=7_120, price_id="bench", estimated=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where to make databases of SQLite (default: for temporary files)")
    parser.add_argument("--postgresql", metavar="URL", help="an empty database of PostgreSQL, to measure as well")
    parser.add_argument("--at-once", default="1,8,64,256", help="calls at once (default: %(default)s)")
    parser.add_argument("--tenants", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=2.0, help="of a round (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every single measurement there")
    arguments = parser.parse_args()
    facts = machine.describe()
    facts["libraries"] = ", ".join(f"{name} {version(name)}" for name in ("sqlalchemy", "psycopg"))
    machine.print_header(facts)
    rounds = []
    print("| database | at once | calls/s | hold p50, ms | hold p99, ms | calls a transaction | CPU of a call, µs |")
    print("|---|---|---|---|---|---|---|")
    for database in ["sqlite", *(["postgresql"] if arguments.postgresql else [])]:
        for at_once in map(int, arguments.at_once.split(",")):
            measured = [asyncio.run(_round(arguments, database, at_once, number)) for number in range(arguments.rounds)]
            rounds.append({"database": database, "at_once": at_once, "rounds": measured})
            cells = [
                with_interval([one[0] for one in measured], 0),
                with_interval([one[1] for one in measured]),
                with_interval([one[2] for one in measured]),
                with_interval([one[3] for one in measured], 1),
                with_interval([one[4] for one in measured], 0),
            ]
            print(f"| {database} | {at_once} | {' | '.join(cells)} |", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps({"facts": facts, "rounds": rounds}, indent=1))


async def _round(
    arguments: argparse.Namespace, database: str, at_once: int, number: int
) -> tuple[float, float, float, float, float]:
    """Calls a second, the median and the 99th percentile of holds in milliseconds, calls a transaction, and the
    processor's microseconds for a call.
    """
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        setting = "auto" if database == "sqlite" else arguments.postgresql
        async with Ledger.open(setting, state_dir=Path(folder), currency="USD") as ledger:
            num_commits = 0

            @event.listens_for(ledger._database._writers, "commit")
            def committed(_: Connection) -> None:
                nonlocal num_commits
                num_commits += 1

            seconds: list[float] = []
            began = time.perf_counter()
            until = began + arguments.seconds
            callers = (_caller(ledger, caller % arguments.tenants, until, seconds) for caller in range(at_once))
            cpu = time.process_time()
            await asyncio.gather(*callers)
            await ledger.write(lambda _: None)  # behind all settlements
            cpu = time.process_time() - cpu
            took = time.perf_counter() - began
    milliseconds = [1e3 * one for one in seconds]
    return (
        len(seconds) / took,
        percentile(milliseconds, 50),
        percentile(milliseconds, 99),
        len(seconds) / num_commits,
        1e6 * cpu / len(seconds),
    )


async def _caller(ledger: Ledger, tenant: int, until: float, seconds: list[float]) -> None:
    name = f"tenant-{tenant}"
    request = HoldRequest(
        tenant=name,
        key=f"key-{tenant}",
        model="letters",
        request_id="bench",
        worst_case=WorstCase(input_tokens=100, n=1, max_new_tokens=64, price=_PRICE),
        allowances=((Account(name), Allowance(nanos=10**15, tokens=10**12)),),
    )
    while time.perf_counter() < until:
        began = time.perf_counter()
        hold = await ledger.hold(request)
        seconds.append(time.perf_counter() - began)
        settlement = Settlement(
            hold=hold, usage=_USAGE, cost=_COST, outcome=AttemptOutcome.COMPLETED, backend="scripted"
        )
        ledger.note(hold, _USAGE, 7_120, _PRICE, "scripted")
        ledger.settle(settlement)


if __name__ == "__main__":
    main()

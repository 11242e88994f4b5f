"""Two vLLM servers, a Redis and disks, while all of them fail at random; what the clients saw of it.

usage: python -m benchmarks.soak --model FOLDER [--minutes N] [--seed N] [--json FILE] [--logs FOLDER]

Clients ask both servers all the time. Every few seconds something happens: a server or Redis is killed and started
again, the network to Redis is cut, stalls or loses all packets for five seconds, bits flip in Redis and in files on
disk, a disk is full, a server's wall clock jumps. Exits with 1 if an exact answer was wrong, a request failed whose
server was alive, a pin or a reference was left in a server without requests, or a request lost more time to the cache
than the configured deadline allows: what the servers say in their replies of how long it waited for the cache, and
how long their loop stood still in our hooks meanwhile. How much longer than alone a request took is shown too; it is
also what else the machine does. Server A reaches Redis through a link that closes and stalls connections, B through
a network namespace that loses packets, where the machine allows to make one.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table

from benchmarks.soak.clients import BLENDED, COMPUTED, EXACT, Clients
from benchmarks.soak.faults import Faults
from benchmarks.soak.network import FAR, Namespace
from benchmarks.soak.servers import DEADLINE, Server, start_server
from demo.fleet.redis_link import RedisLink
from demo.fleet.redis_server import RedisServer

console = Console(highlight=False)


def run(clients: Clients, faults: Faults, minutes: float, seed: int) -> None:
    choose = random.Random(seed)
    clients.start()
    end = time.monotonic() + 60 * minutes
    while time.monotonic() < end:
        clients.happening = "nothing"
        time.sleep(choose.uniform(3, 8))
        clients.happening = name = faults.choose()
        seen = clients.seen
        told = f"{seen.served.total()} served, {len(seen.wrong)} wrong, {len(seen.failed)} failed"
        console.print(f"[dim]{time.strftime('%H:%M:%S')} {name}; {told}")
        faults.happen(name)
    clients.happening = "nothing"
    time.sleep(10)
    clients.stop()


def report(clients: Clients, faults: Faults) -> tuple[dict[str, float], list[str]]:
    """The figures, and what must not be."""
    seen = clients.seen
    ours = [*seen.over[EXACT], *seen.over[BLENDED]]
    longest, machine = (max((over for over, _ in each), default=0.0) for each in (ours, seen.over[COMPUTED]))
    stalls = sorted(seen.stalls, reverse=True)
    figures = {
        "requests served": seen.served.total(),
        **{f"of these {way}": count for way, count in seen.served.items()},
        "wrong texts": len(seen.wrong),
        "failed although the server was alive": len(seen.failed),
        "cut off with their server": seen.cut_off,
        "times that leaks were looked for": faults.looked,
        "leaked pins or references": len(faults.leaked),
        "tokens asked for": seen.prompt_tokens,
        **{f"tokens from {tier}": count for tier, count in seen.tiers.items()},
        **{f"seconds to first token, {way}, median": median(all_) for way, all_ in seen.seconds.items() if all_},
        "requests that waited for the cache": sum(stall.wait > 0 for stall in stalls),
        "longest stall of a request caused by us, seconds": stalls[0].seconds if stalls else 0.0,
        "  of this waiting for the cache": stalls[0].wait if stalls else 0.0,
        "  of this in hooks of the engine's loop": stalls[0].hooks if stalls else 0.0,
        "longest that one lost in hooks": max((stall.hooks for stall in stalls), default=0.0),
        "the configured deadline": DEADLINE,
        "longest beyond computing alone, with the cache": longest,
        "the same of requests that go without the cache": machine,
    }
    problems = [*seen.wrong, *seen.failed, *faults.leaked]
    if not seen.served:
        problems.append("nothing was served")
    if seen.untold:
        problems.append(f"{seen.untold} replies do not tell what their requests lost to the cache")
    problems += [f"lost to the cache: {stall}" for stall in stalls[:5] if stall.seconds > DEADLINE]
    return figures, problems


def longest_hooks(servers: Sequence[Server]) -> dict[str, float]:
    """Seconds of the longest single call of each."""
    names = {name for server in servers for name in server.longest_hooks}
    return {name: max(server.longest_hooks.get(name, 0.0) for server in servers) for name in sorted(names)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--logs", type=Path, help="folder to keep the servers' logs in")
    given = parser.parse_args()
    # Servers and mounts are to go also when this is ended from outside.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    with ExitStack() as running:
        work = Path(running.enter_context(tempfile.TemporaryDirectory(prefix="soak-", ignore_cleanup_errors=True)))
        namespace = Namespace(running)
        arguments = ["--maxmemory", "128mb", "--maxmemory-policy", "allkeys-lru"]
        program, host = "redis-server", "127.0.0.1"
        if namespace.is_there:
            program, host = namespace.program(work, program), FAR
            arguments += ["--bind", FAR, "--protected-mode", "no"]
        redis = running.enter_context(RedisServer(work, arguments, program))
        link = running.enter_context(RedisLink(redis.port, host))
        ports = {
            "A": ("127.0.0.1", link.port),
            "B": (host, redis.port) if namespace.is_there else ("127.0.0.1", link.port),
        }
        servers = [
            start_server(name, running, work, given.model.resolve(), f"redis://{at}:{port}")
            for name, (at, port) in ports.items()
        ]
        clients = Clients(servers, given.seed)
        faults = Faults(servers, redis, link, namespace, given.seed)
        for missing in faults.left_out:
            console.print(f"[yellow]left out: {missing}")
        clients.learn()
        run(clients, faults, given.minutes, given.seed)
        for server in servers:
            faults.look_for_leaks(server)
        if given.logs:
            given.logs.mkdir(parents=True, exist_ok=True)
            for server in servers:
                (given.logs / server.log.name).write_bytes(server.log.read_bytes())
        tracebacks = sum(server.log.read_text(errors="replace").count("Traceback") for server in servers)
    figures, problems = report(clients, faults)
    figures["tracebacks in the servers' logs"] = tracebacks
    table = Table("", "", title=f"{given.minutes:g} minutes, {faults.counts.total()} faults", show_header=False)
    for fault, count in sorted(faults.counts.items()):
        table.add_row(f"  {fault}", str(count))
    table.add_section()
    for name, figure in figures.items():
        table.add_row(name, f"{figure:,.2f}" if isinstance(figure, float) else f"{figure:,}")
    console.print(table)
    for stall in sorted(clients.seen.stalls, reverse=True)[:5]:
        console.print(f"[dim]lost to the cache {stall}")
    for hook, seconds in sorted(longest_hooks(servers).items(), key=lambda each: -each[1]):
        console.print(f"[dim]longest call of {hook}: {1e3 * seconds:.1f} ms")
    slow = sorted((over, way, what) for way, all_ in clients.seen.over.items() for over, what in all_)[-8:]
    for over, way, what in reversed(slow):
        console.print(f"[dim]{over:6.2f} s longer than alone: {way}, {what}")
    for missing in faults.left_out:
        console.print(f"[yellow]left out: {missing}")
    for problem in problems[:12]:
        console.print(f"[red]{problem}", markup=False)
    if given.json:
        told = {
            "faults": faults.counts,
            "left out": faults.left_out,
            **figures,
            "longest calls of hooks, seconds": longest_hooks(servers),
        }
        given.json.write_text(json.dumps(told, indent=1))
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())

"""What the HTTP endpoint adds to ``Embedder.encode``, and what its batches gain.

    python benchmarks/serve.py gircse-demo-int8 --precision int8 --output serve.json
    python benchmarks/serve.py gircse-demo-int8 --precision int8 --only overload --seconds 600

``gircse-serve`` runs in a process of its own, the clients in threads of this one, on the same cores; each keeps a
connection open and asks for base64. The baseline is an ``Embedder`` in this process, with nothing else running: its
texts and the server's take turns where times of one text are compared.
"""

import argparse
import base64
import contextlib
import http.client
import json
import random
import re
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from gircse.runtime import Embedder

WORDS = "how do I reset the card after a storm in my garden while the small bird sings about old ships".split()
SHORT, LONG = 12, 300


def text_of(words: int, seed: int) -> str:
    """Return a text of so many words."""
    return " ".join(random.Random(seed).choices(WORDS, k=words))


class Client:
    """One connection to the server."""

    def __init__(self, address: str) -> None:
        host, port = address.removeprefix("http://").rsplit(":", 1)
        self._connection = http.client.HTTPConnection(host, int(port))

    def post(self, texts: str | Sequence[str]) -> tuple[int, np.ndarray]:
        """Return the status and the vectors (texts, hidden), none where there are none."""
        body = json.dumps({"input": texts, "encoding_format": "base64"})
        self._connection.request("POST", "/v1/embeddings", body, {"Content-Type": "application/json"})
        answer = self._connection.getresponse()
        content = json.loads(answer.read())
        rows = [np.frombuffer(base64.b64decode(item["embedding"]), "<f4") for item in content.get("data", [])]
        return answer.status, np.array(rows)


@contextlib.contextmanager
def server(arguments: Sequence[str]) -> Iterator[tuple[str, psutil.Process]]:
    """Run ``gircse-serve``; yields its address and process."""
    command = [sys.executable, "-m", "gircse.serving.serve_command", *arguments, "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            found = re.search(r"http://\S+", process.stdout.readline())
            assert found is not None, "the server did not start"
            yield found[0], psutil.Process(process.pid)
        finally:
            process.terminate()


def clients(address: str, count: int, work: Callable[[Client, int], None]) -> float:
    """Run so many clients at once and return the seconds until all are done."""
    threads = [threading.Thread(target=work, args=[Client(address), number]) for number in range(count)]
    begun = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.perf_counter() - begun


def one_client(address: str, embedder: Embedder, repeats: int) -> dict[str, Any]:
    """Compare one short text over HTTP with ``encode``, in turns."""
    client, text = Client(address), text_of(SHORT, 0)
    seconds: dict[str, list[float]] = {"http": [], "encode": []}
    for _ in range(repeats + 3):
        for name, embed in (("http", lambda: client.post(text)), ("encode", lambda: embedder.encode([text]))):
            begun = time.perf_counter()
            embed()
            seconds[name].append(time.perf_counter() - begun)
    http_ms, encode_ms = (1000 * statistics.median(seconds[name][3:]) for name in ("http", "encode"))
    return {"http_ms": http_ms, "encode_ms": encode_ms, "limit_ms": 1.05 * encode_ms + 3}


def many_clients(address: str, embedder: Embedder, texts: int, rounds: int = 5) -> dict[str, Any]:
    """Compare 64 clients that send texts of mixed lengths, one a request, with ``encode`` of all of them."""
    lengths = random.Random(1)
    mixed = [text_of(round(lengths.lognormvariate(2.8, 0.7)) + 1, seed) for seed in range(texts)]
    found: dict[int, np.ndarray] = {}

    def ask(client: Client, number: int) -> None:
        for row in range(number, texts, 64):
            found[row] = client.post(mixed[row])[1][0]

    served, encoded = [], []
    for _ in range(rounds):
        served.append(clients(address, 64, ask))
        begun = time.perf_counter()
        expected = embedder.encode(mixed)
        encoded.append(time.perf_counter() - begun)
    return {
        "served_per_s": texts / statistics.median(served),
        "encoded_per_s": texts / statistics.median(encoded),
        "ratio": statistics.median(encoded) / statistics.median(served),
        "min_cosine": min(float(found[row] @ expected[row]) for row in range(texts)),
    }


def batching(address: str, requests: int) -> dict[str, Any]:
    """Compare 32 clients at once with one after the other, all with short texts."""

    def ask(client: Client, number: int) -> None:
        for row in range(number, requests, 32):
            client.post(text_of(SHORT, row))

    together = clients(address, 32, ask)
    alone = clients(
        address, 1, lambda client, _: [client.post(text_of(SHORT, row)) for row in range(requests // 4)] and None
    )
    return {
        "together_per_s": requests / together,
        "alone_per_s": (requests // 4) / alone,
        "ratio": 4 * alone / together,
    }


def short_beside_long(address: str, requests: int) -> dict[str, Any]:
    """Compare the time of short texts alone with theirs while four clients send long texts without a pause."""

    def measure(client: Client) -> list[float]:
        seconds = []
        for row in range(requests):
            begun = time.perf_counter()
            client.post(text_of(SHORT, row))
            seconds.append(time.perf_counter() - begun)
        return seconds

    alone = measure(Client(address))
    ended = threading.Event()

    def load(client: Client, number: int) -> None:
        row = 0
        while not ended.is_set():
            client.post([text_of(LONG, 1000 * number + row)])
            row += 1

    threads = [threading.Thread(target=load, args=[Client(address), number]) for number in range(4)]
    for thread in threads:
        thread.start()
    time.sleep(2)
    loaded = measure(Client(address))
    ended.set()
    for thread in threads:
        thread.join()
    p99 = [1000 * float(np.percentile(seconds, 99)) for seconds in (alone, loaded)]
    medians = [1000 * statistics.median(seconds) for seconds in (alone, loaded)]
    return {
        "alone_p99_ms": p99[0],
        "loaded_p99_ms": p99[1],
        "ratio": p99[1] / p99[0],
        "alone_ms": medians[0],
        "loaded_ms": medians[1],
    }


def overload(address: str, process: psutil.Process, embedder: Embedder, seconds: float) -> dict[str, Any]:
    """Send twice what the server can do; every answer is compared with ``encode``, every refusal has to be 429."""
    texts = [text_of(1 + seed % 60, seed) for seed in range(200)]
    expected = embedder.encode(texts)
    statuses: dict[int, int] = {}
    worst, lock, end = 1.0, threading.Lock(), time.perf_counter() + seconds

    def ask(client: Client, number: int) -> None:
        nonlocal worst
        order = random.Random(number)
        while time.perf_counter() < end:
            rows = order.sample(range(len(texts)), order.choice((1, 1, 1, 8, 32)))
            status, vectors = client.post([texts[row] for row in rows])
            with lock:
                statuses[status] = statuses.get(status, 0) + 1
                if status == 200:
                    worst = min(
                        worst, *(float(vector @ expected[row]) for vector, row in zip(vectors, rows, strict=True))
                    )
            if status == 429:
                time.sleep(0.05)

    memory = [process.memory_info().rss]
    watch = threading.Thread(target=clients, args=[address, 48, ask])
    watch.start()
    while watch.is_alive():
        watch.join(seconds / 20)
        memory.append(process.memory_info().rss)
    third = len(memory) // 3
    return {
        "statuses": statuses,
        "min_cosine": worst,
        "memory_mib": [round(value / 2**20) for value in memory],
        "growth_of_last_two_thirds_mib": (max(memory[-third:]) - max(memory[third : 2 * third])) / 2**20,
    }


def main() -> None:
    """Measure and print, or write, everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--precision")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", action="append", help="one of the measurements")
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=60, help="of overload")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    arguments = [str(args.bundle), "--provider", "cpu", "--threads", str(args.threads)]
    arguments += ["--precision", args.precision] if args.precision else []
    embedder = Embedder(args.bundle, precision=args.precision, provider="cpu", threads=args.threads)
    results: dict[str, Any] = {}
    for name, extra, measure in (
        ("one client", [], lambda address, _: one_client(address, embedder, 30)),
        ("64 clients", [], lambda address, _: many_clients(address, embedder, args.requests)),
        ("batching", [], lambda address, _: batching(address, args.requests)),
        ("short beside long", [], lambda address, _: short_beside_long(address, 100)),
        (
            "overload",
            ["--max-queue", "4000"],
            lambda address, process: overload(address, process, embedder, args.seconds),
        ),
    ):
        if args.only and name not in args.only:
            continue
        with server([*arguments, *extra]) as (address, process):
            Client(address).post(text_of(SHORT, 0))
            results[name] = measure(address, process)
        print(name, json.dumps(results[name]), flush=True)
    if args.output:
        args.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""What it costs the trainer to have completions sampled by vLLM servers: milliseconds of its processor for each.

    python scripts/bench_servers.py [--repeats 3 --length 64]

There is no vLLM here. What answers waits for half a second, sends as much JSON as vLLM does, and closes connections
after five idle seconds as vLLM does; the rest is the client's.
"""

import argparse
import asyncio
import json
import math
import multiprocessing
import os
import socket
import time

import uvicorn
from script_tools import spread

from aspo_lightning.engines import SamplingRequest, VLLMServers
from aspo_lightning.engines.access import TOKEN

SIZES = (256, 1024, 4096)


def serve(listener: socket.socket, length: int) -> None:
    token = {"token_id": 123, "logprob": -1.2345678, "rank": 1}
    content = [{**token, "top_logprobs": [token]}] * length
    choice = {"token_ids": [123] * length, "logprobs": {"content": content}, "finish_reason": "stop"}
    completion = json.dumps({"choices": [choice]}).encode()

    async def answer(scope, receive, send) -> None:
        while (await receive()).get("more_body"):
            pass
        if scope["method"] == "POST":
            await asyncio.sleep(0.5)
        await send({"type": "http.response.start", "status": 200})
        await send({"type": "http.response.body", "body": completion if scope["method"] == "POST" else b"{}"})

    config = uvicorn.Config(answer, lifespan="off", log_level="warning", timeout_keep_alive=5)
    uvicorn.Server(config).run(sockets=[listener])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--length", type=int, default=64, help="tokens of a completion")
    options = parser.parse_args()
    os.environ.setdefault(TOKEN, "none")
    with socket.create_server(("127.0.0.1", 0), backlog=2048) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        server = multiprocessing.get_context("fork").Process(target=serve, args=(listener, options.length), daemon=True)
        server.start()
    taken: dict[int, list[float]] = {size: [] for size in SIZES}
    for _ in range(options.repeats):
        for size, each in taken.items():
            requests = [SamplingRequest((123,) * 32, options.length, seed=i, temperature=1.0) for i in range(size)]
            start = time.process_time()
            assert sum(1 for _ in VLLMServers([url]).generate(requests)) == size
            each.append(1e3 * (time.process_time() - start) / size)
    server.terminate()
    for size, each in taken.items():
        print(f"{size:6} completions of {options.length} tokens: {spread(each)} ms each")
    growth = [math.log(last / first) for first, last in zip(taken[SIZES[0]], taken[SIZES[-1]], strict=True)]
    slopes = [1 + by / math.log(SIZES[-1] / SIZES[0]) for by in growth]
    print(f"slope of log seconds over log size, from {SIZES[0]} to {SIZES[-1]}: {spread(slopes)}")


if __name__ == "__main__":
    main()

"""Sends back what it gets; every message is worked on in a process of a pool.

python echo_pool.py PORT ADDRESS...
"""

from __future__ import annotations

import asyncio
import sys
from concurrent.futures import ProcessPoolExecutor


def work(data: bytes) -> bytes:
    """In a process of the pool."""
    return bytes(reversed(bytes(reversed(data))))


async def main(port: int, addresses: list[str]) -> None:
    """For ever."""
    loop = asyncio.get_running_loop()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            done = loop.run_in_executor(pool, work, data)
            await asyncio.sleep(0.0005)
            writer.write(await done)
            await writer.drain()
        writer.close()

    with ProcessPoolExecutor(max_workers=2) as pool:
        await loop.run_in_executor(pool, work, b"")
        servers = [await asyncio.start_server(serve, address, port) for address in addresses]
        await asyncio.gather(*(server.serve_forever() for server in servers))


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), sys.argv[2:]))

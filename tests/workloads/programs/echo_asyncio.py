"""Sends back what it gets: asyncio, with a timer beside it that never ends. ``echo_asyncio.py PORT ADDRESS...``"""

import asyncio
import sys


async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65536):
        await asyncio.sleep(0.001)
        writer.write(data)
        await writer.drain()
    writer.close()


async def main() -> None:
    loop = asyncio.get_running_loop()

    def tick() -> None:
        loop.call_later(0.01, tick)

    tick()
    for address in sys.argv[2:]:
        await asyncio.start_server(serve, address, int(sys.argv[1]))
    await asyncio.Event().wait()


asyncio.run(main())

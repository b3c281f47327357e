"""What the manager wants of an app proxy: its status, and a place to tell the address of an application."""

from aiohttp import web


class AppProxy:
    def __init__(self, port):
        self.port = port
        self.told = []

    async def start(self):
        app = web.Application()
        app.router.add_get("/status", self._status)
        app.router.add_post("/v2/conf", self._configure)
        self.runner = web.AppRunner(app)
        await self.runner.setup()
        await web.TCPSite(self.runner, "127.0.0.1", self.port).start()

    async def _status(self, _request):
        return web.json_response({"api_version": "v2", "advertise_address": f"http://127.0.0.1:{self.port}"})

    async def _configure(self, request):
        self.told.append(await request.json())
        return web.json_response({"token": f"token-{len(self.told)}"})

    async def close(self):
        await self.runner.cleanup()

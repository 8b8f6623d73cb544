"""A small S3: enough of the protocol for the real client, and ways to misbehave. It knows no signatures."""

import asyncio
import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from urllib.parse import unquote
from xml.sax.saxutils import escape

from aiohttp import web


@dataclass
class FakeS3:
    """Objects by key, uploads under way, and faults: what is set here happens until it is taken back."""

    objects: dict[str, bytes] = field(default_factory=dict)
    uploads: dict[str, dict[int, bytes]] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    fail_part: int | None = None
    """Answer 403 to this part of every upload."""
    truncate: int | None = None
    """Promise all of an object and close after so many bytes."""
    hang: bool = False
    """Answer nothing any more."""
    drop_puts: bool = False
    """Say yes to a put and keep what was there."""
    started: asyncio.Event = field(default_factory=asyncio.Event)
    """A part of an upload arrived."""

    async def handle(self, request: web.Request) -> web.StreamResponse:
        key, query = unquote(request.path).removeprefix("/bucket").lstrip("/"), request.query
        self.requests.append(f"{request.method} {key} {','.join(sorted(query))}".strip())
        if self.hang:
            await asyncio.Event().wait()
        if request.method == "GET" and not key:
            return self._list(query["prefix"])
        if request.method == "POST" and "delete" in query:
            body = (await request.read()).decode()
            keys = [piece.split("</Key>")[0] for piece in body.split("<Key>")[1:]]
            for gone in keys:
                self.objects.pop(gone, None)
            deleted = "".join(f"<Deleted><Key>{gone}</Key></Deleted>" for gone in keys)
            return _xml(f"<DeleteResult>{deleted}</DeleteResult>")
        if "uploads" in query or "uploadId" in query:
            return await self._multipart(request, key)
        if request.method == "PUT":
            data = await request.read()
            if not self.drop_puts:
                self.objects[key] = data
            return web.Response(headers={"ETag": _etag(data)})
        if request.method == "DELETE":
            self.objects.pop(key, None)
            return web.Response(status=204)
        return await self._read(request, key)

    async def _multipart(self, request: web.Request, key: str) -> web.Response:
        query = request.query
        if request.method == "POST" and "uploads" in query:
            upload = f"upload-{len(self.requests)}"
            self.uploads[upload] = {}
            return _xml(
                f"<InitiateMultipartUploadResult><Bucket>bucket</Bucket><Key>{escape(key)}</Key>"
                f"<UploadId>{upload}</UploadId></InitiateMultipartUploadResult>"
            )
        upload = query["uploadId"]
        if request.method == "PUT":
            number, data = int(query["partNumber"]), await request.read()
            self.started.set()
            if number == self.fail_part:
                return web.Response(status=403, text="<Error><Code>AccessDenied</Code></Error>")
            self.uploads[upload][number] = data
            return web.Response(headers={"ETag": _etag(data)})
        parts = self.uploads.pop(upload)
        if request.method == "DELETE":
            return web.Response(status=204)
        self.objects[key] = b"".join(parts[number] for number in sorted(parts))
        return _xml(
            f"<CompleteMultipartUploadResult><Location>x</Location><Bucket>bucket</Bucket><Key>{escape(key)}</Key>"
            f"<ETag>{_etag(self.objects[key])}</ETag></CompleteMultipartUploadResult>"
        )

    async def _read(self, request: web.Request, key: str) -> web.StreamResponse:
        if key not in self.objects:
            return web.Response(status=404, text="<Error><Code>NoSuchKey</Code></Error>")
        data, status = self.objects[key], 200
        headers = {"ETag": _etag(data), "Last-Modified": "Thu, 01 Jan 2026 00:00:00 GMT"}
        if request.headers.get("If-Match", headers["ETag"]) != headers["ETag"]:
            return web.Response(status=412, text="<Error><Code>PreconditionFailed</Code></Error>")
        wanted = request.http_range
        if wanted.start is not None:
            start, whole = wanted.start, len(data)
            data, status = data[start : wanted.stop], 206
            headers["Content-Range"] = f"bytes {start}-{start + len(data) - 1}/{whole}"
        response = web.StreamResponse(status=status, headers=headers | {"Content-Length": str(len(data))})
        await response.prepare(request)
        if request.method == "GET":
            if self.truncate is not None and self.truncate < len(data):
                await response.write(data[: self.truncate])
                assert request.transport is not None
                request.transport.close()
                return response
            await response.write(data)
        await response.write_eof()
        return response

    def _list(self, prefix: str) -> web.Response:
        entries = "".join(
            f"<Contents><Key>{escape(key)}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>"
            f"<ETag>{_etag(data)}</ETag><Size>{len(data)}</Size></Contents>"
            for key, data in sorted(self.objects.items())
            if key.startswith(prefix)
        )
        return _xml(f"<ListBucketResult><IsTruncated>false</IsTruncated>{entries}</ListBucketResult>")


@asynccontextmanager
async def serve_s3(fake: FakeS3) -> AsyncIterator[str]:
    """The endpoint of a running `fake`, for path-style requests to the bucket "bucket"."""
    application = web.Application(client_max_size=1 << 30)
    application.router.add_route("*", "/{path:.*}", fake.handle)
    runner = web.AppRunner(application, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        host, port = runner.addresses[0][:2]
        yield f"http://{host}:{port}"
    finally:
        await runner.cleanup()


def _etag(data: bytes) -> str:
    return f'"{hashlib.md5(data, usedforsecurity=False).hexdigest()}"'


def _xml(body: str) -> web.Response:
    return web.Response(text=f'<?xml version="1.0" encoding="UTF-8"?>{body}', content_type="application/xml")

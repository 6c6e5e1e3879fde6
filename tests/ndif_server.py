"""A server of one model that does what NDIF does with a request, and knows nothing of this repository.

Run in an interpreter of its own, `python -I -S ndif_server.py SITE_PACKAGES FOLDER MODEL_ID DTYPE`, in which
`lib` cannot be imported. It also answers for the hub, of which it has that one model. As NDIF does, it
refuses what its sandbox does not know and functions that come as bytecode, and makes tensors of bfloat16
where code does not say otherwise. Prints its port when it is ready.
"""

import io
import json
import os
import sys
import traceback
from pathlib import Path

sys.path.append(sys.argv[1])
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import zstandard
from nnsight import TransformersModel
from nnsight.intervention.serialization import CustomCloudUnpickler
from nnsight.schema.request import RequestModel
from nnsight.schema.response import ResponseModel, Status
from nnsight.tracing import tracer as tracing
from tornado.httpserver import HTTPServer
from tornado.ioloop import IOLoop
from tornado.web import Application, RequestHandler
from tornado.websocket import WebSocketHandler

FOLDER, MODEL_ID, DTYPE = Path(sys.argv[2]), sys.argv[3], sys.argv[4]
COMMIT = "5" * 40
# What NDIF's sandbox lets a request be made of.
ALLOWED = {
    "builtins", "torch", "numpy", "collections", "nnsight", "transformers", "cloudpickle", "copyreg",
    "_operator", "functools", "dataclasses", "typing", "types",
}  # fmt: skip


class Sandbox(CustomCloudUnpickler):
    def find_class(self, module, name):
        if module.split(".")[0] not in ALLOWED:
            raise ModuleNotFoundError(f"No module named {module!r}")
        if name == "_make_function":  # cloudpickle's, from bytecode
            raise ValueError("a function came without source, which another Python cannot read")
        return super().find_class(module, name)


def execute(blob, request):
    """The values that a request saves."""
    model._remoteable_set_env(request.env)
    tracer = RequestModel.deserialize(blob, model._remoteable_persistent_objects(), request.compress, Sandbox)
    tracing.inc()
    try:
        tracer.execute(tracer.info.code)
        saved = tracing._saves()
        return {name: value for name, value in tracer.info.frame.f_locals.items() if id(value) in saved}
    finally:
        tracing.dec()


class Subscribe(WebSocketHandler):
    sessions = {}

    def open(self):
        name = str(len(self.sessions))
        self.sessions[name] = self
        self.write_message(json.dumps({"session_id": name}))


class Request(RequestHandler):
    def post(self):
        request = RequestModel.model_validate_json(self.get_body_argument("data"))
        if self.request.headers.get("ndif-api-key") != "a key":
            self.set_status(401)
            return self.write({"detail": "no such key"})
        wanted = {"repo_id": MODEL_ID, "revision": None, "task": "text-generation"}
        class_path, key = request.model_key.split(":", 1)
        if class_path != "nnsight.modeling.transformers.TransformersModel" or json.loads(key) != wanted:
            self.set_status(404)
            return self.write({"detail": f"{request.model_key} is not deployed"})
        blob = self.request.files["blob"][0]["body"]
        try:
            buffer = io.BytesIO()
            torch.save(execute(blob, request), buffer)
            data = buffer.getvalue()
            if request.compress:
                data = zstandard.ZstdCompressor().compress(data)
            done = ResponseModel(id="1", status=Status.COMPLETED, data=data).pickle()
        except Exception:
            done = ResponseModel(id="1", status=Status.ERROR, description=traceback.format_exc())
            done = done.model_dump_json()
        Subscribe.sessions.pop(request.session_id).write_message(done, binary=isinstance(done, bytes))
        return self.write(ResponseModel(id="1", status=Status.RECEIVED).model_dump_json())


class Hub(RequestHandler):
    """Files and facts of the one model."""

    def get(self, path):
        if path == f"api/models/{MODEL_ID}":
            return self.write(
                {"id": MODEL_ID, "modelId": MODEL_ID, "sha": COMMIT, "siblings": [], "tags": []}
            )
        if path.startswith(f"api/models/{MODEL_ID}/tree/"):
            return self.finish("[]")
        file = FOLDER / path.split("/")[-1]
        self.set_header("X-Repo-Commit", COMMIT)
        if not path.startswith(f"{MODEL_ID}/resolve/") or not file.is_file():
            self.set_header("X-Error-Code", "EntryNotFound" if path.startswith(MODEL_ID) else "RepoNotFound")
            self.set_status(404)
            return self.finish()
        self.set_header("ETag", f'"{file.name}"')
        return self.finish(file.read_bytes())

    head = get


assert "lib" not in sys.modules
try:
    import lib  # noqa: F401
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("lib can be imported here: this server would prove nothing")
model = TransformersModel(
    str(FOLDER),
    task="text-generation",
    dispatch=True,
    dtype=getattr(torch, DTYPE),
    attn_implementation="eager",
)
model._module.requires_grad_(False)
torch.set_default_dtype(torch.bfloat16)
server = HTTPServer(
    Application([("/subscribe", Subscribe), ("/request", Request), ("/(.*)", Hub)]), max_buffer_size=2**30
)
server.listen(0, "127.0.0.1")
print(next(iter(server._sockets.values())).getsockname()[1], flush=True)
IOLoop.current().start()

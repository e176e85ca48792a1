"""A caller that was made from the proto files alone, against a real service.

Usage: client_check.py ENDPOINT [CHECK ...] (host:port; all checks where none is named). The stubs of runner.v1 must be importable. Prints a line a check; the exit
status is 0 only when every check passed.
"""

import hashlib
import os
import random
import subprocess
import sys
import time
import traceback
import urllib.error
import urllib.parse
import urllib.request
import uuid

import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from runner.v1 import admin_pb2, admin_pb2_grpc
from runner.v1 import artifacts_pb2, artifacts_pb2_grpc
from runner.v1 import runner_pb2, runner_pb2_grpc
from runner.v1 import types_pb2

LOG_BYTES = 200 * 1024 * 1024
# No call and no wait of this script lasts longer.
DEADLINE_SECONDS = 180


class Caller:
    def __init__(self, endpoint):
        self.base = f"http://{endpoint}"
        # A manifest of many files is one message.
        options = [("grpc.max_receive_message_length", 64 << 20)]
        self.channel = grpc.insecure_channel(endpoint, options=options)
        self.runner = runner_pb2_grpc.RunnerStub(self.channel)
        self.artifacts = artifacts_pb2_grpc.ArtifactsStub(self.channel)
        self.admin = admin_pb2_grpc.AdminStub(self.channel)

    def run(self, *command, **fields):
        spec = types_pb2.RunSpec(command=command, **fields)
        # An id of the caller's own: the call may be repeated when its answer is lost.
        request = runner_pb2.RunRequest(spec=spec, run_id=str(uuid.uuid4()))
        return self.runner.Run(request, timeout=30).run.run_id

    def events(self, run_id, cursor=""):
        request = runner_pb2.StreamRequest(run_id=run_id, cursor=cursor)
        return self.runner.Stream(request, timeout=DEADLINE_SECONDS)

    def finish(self, run_id):
        """Follows a run to its end: its streams, and the terminal event."""
        out = {}
        end = None
        for event in self.events(run_id):
            assert end is None, "nothing follows the terminal event"
            kind = event.WhichOneof("event")
            if kind == "log":
                out[event.log.stream] = out.get(event.log.stream, b"") + event.log.data
            elif kind == "terminated":
                end = event.terminated
        assert end is not None, "the last event is the terminal one"
        return out, end

    def send(self, signed, body=None, headers=None):
        url = urllib.parse.urljoin(self.base, signed.url)
        headers = {**dict(signed.headers), **(headers or {})}
        request = urllib.request.Request(url, data=body, method=signed.method, headers=headers)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read()


def check_run_and_streams(caller):
    run_id = caller.run("sh", "-c", "echo out; echo err >&2; exit 7")
    out, end = caller.finish(run_id)
    assert out == {runner_pb2.LOG_STREAM_STDOUT: b"out\n", runner_pb2.LOG_STREAM_STDERR: b"err\n"}, out
    assert end.state == types_pb2.RUN_STATE_FAILED
    assert end.outcome.cause == types_pb2.CAUSE_EXITED
    assert end.outcome.WhichOneof("status") == "exit_code" and end.outcome.exit_code == 7
    seen = caller.runner.Get(runner_pb2.GetRequest(run_id=run_id), timeout=30).run
    assert seen.outcome == end.outcome
    again = runner_pb2.ListRequest(states=[types_pb2.RUN_STATE_FAILED])
    assert run_id in [run.run_id for run in caller.runner.List(again, timeout=30).runs]


def check_same_id_same_run(caller):
    request = runner_pb2.RunRequest(spec=types_pb2.RunSpec(command=["true"]), run_id=str(uuid.uuid4()))
    first = caller.runner.Run(request, timeout=30)
    second = caller.runner.Run(request, timeout=30)
    assert first.created and not second.created and first.run.run_id == second.run.run_id
    request.spec.command[0] = "false"
    error = refusal(lambda: caller.runner.Run(request, timeout=30))
    assert error.code() == grpc.StatusCode.ALREADY_EXISTS, error.code()
    caller.finish(first.run.run_id)


def check_resume_inside_a_large_log(caller):
    program = f"seq 1 100000000 | head -c {LOG_BYTES}"
    expected = hashlib.sha256()
    with subprocess.Popen(["sh", "-c", program], stdout=subprocess.PIPE) as source:
        for chunk in iter(lambda: source.stdout.read(1 << 20), b""):
            expected.update(chunk)
    run_id = caller.run("sh", "-c", program)
    seed = int(os.environ.get("CLIENT_CHECK_SEED", random.randrange(1 << 32)))
    print(f"  seed {seed}", flush=True)
    # Cut at random places, some of them close together.
    places = random.Random(seed)
    cuts = sorted(places.randrange(LOG_BYTES) for _ in range(12))
    cuts.insert(0, cuts[0] // 2)
    got, length, cursor, resumed, ended = hashlib.sha256(), 0, "", 0, False
    while not ended:
        call = caller.events(run_id, cursor)
        for event in call:
            kind = event.WhichOneof("event")
            assert kind != "log_truncated", event.log_truncated
            if kind == "log":
                assert event.log.offset == length, f"{event.log.offset} came where {length} was expected"
                got.update(event.log.data)
                length += len(event.log.data)
            ended = kind == "terminated"
            cursor = event.cursor or cursor
            if cuts and length >= cuts[0]:
                del cuts[0]
                resumed += 1
                call.cancel()
                break
        else:
            assert ended, "the stream ended before the run did"
    assert length == LOG_BYTES, length
    assert got.hexdigest() == expected.hexdigest(), "the log's SHA-256 differs"
    assert resumed == 13, resumed
    print(f"  {length} bytes in {resumed + 1} pieces", flush=True)


def check_cancel(caller):
    run_id = caller.run("sh", "-c", "echo up; sleep 600")
    end = None
    for event in caller.events(run_id):
        kind = event.WhichOneof("event")
        if kind == "log":
            answer = caller.runner.Cancel(runner_pb2.CancelRequest(run_id=run_id, reason="check"), timeout=30)
            assert answer.run.cancel_requested
            caller.runner.Cancel(runner_pb2.CancelRequest(run_id=run_id, reason="twice"), timeout=30)
        elif kind == "terminated":
            end = event.terminated
    assert end is not None and end.state == types_pb2.RUN_STATE_CANCELLED, end
    assert end.outcome.cause == types_pb2.CAUSE_CANCELLED


def refusal(call):
    try:
        call()
    except grpc.RpcError as error:
        return error
    raise AssertionError("the call was not refused")


def detail(error, kind):
    status = rpc_status.from_call(error)
    assert status is not None, "the error has no google.rpc.Status"
    for packed in status.details:
        found = kind()
        if packed.Unpack(found):
            return found
    raise AssertionError(f"no {kind.__name__} in {status}")


def check_typed_errors(caller):
    spec = types_pb2.RunSpec(
        command=["true"],
        inputs=[types_pb2.Input(path="/inputs/../x", inline=b"x")],
        outputs=[types_pb2.Output(path="relative")],
    )
    error = refusal(lambda: caller.runner.Run(runner_pb2.RunRequest(spec=spec), timeout=30))
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
    fields = [violation.field for violation in detail(error, error_details_pb2.BadRequest).field_violations]
    assert "spec.inputs[0].path" in fields and "spec.outputs[0].path" in fields, fields
    assert detail(error, error_details_pb2.ErrorInfo).reason == "INVALID_ARGUMENT"

    spec = types_pb2.RunSpec(command=["true"], routing=types_pb2.Routing(backend="no-such-backend"))
    error = refusal(lambda: caller.runner.Run(runner_pb2.RunRequest(spec=spec), timeout=30))
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert detail(error, error_details_pb2.BadRequest).field_violations[0].field == "spec.routing.backend"

    missing = runner_pb2.GetRequest(run_id=str(uuid.uuid4()))
    error = refusal(lambda: caller.runner.Get(missing, timeout=30))
    assert error.code() == grpc.StatusCode.NOT_FOUND
    assert detail(error, error_details_pb2.ErrorInfo).reason == "RUN_NOT_FOUND"


def check_artifacts(caller):
    body = os.urandom(3 << 20)
    digest = hashlib.sha256(body).hexdigest()
    wanted = artifacts_pb2.CreateUploadRequest(path="data.bin", size=len(body), sha256=digest)
    upload = caller.artifacts.CreateUpload(wanted, timeout=30)
    try:
        caller.send(upload.url, bytes(len(body)))
        raise AssertionError("other bytes than were promised were taken")
    except urllib.error.HTTPError as refused:
        assert refused.code == 400, refused.code
    status, _ = caller.send(upload.url, body)
    assert status == 200, status

    run_id = caller.run(
        "sh",
        "-c",
        "sha256sum < /inputs/data.bin | cut -c1-64; cp /inputs/data.bin /outputs/copy",
        inputs=[types_pb2.Input(path="/inputs/data.bin", uri=upload.uri, sha256=digest)],
        outputs=[types_pb2.Output(path="/outputs/copy", required=True)],
    )
    out, end = caller.finish(run_id)
    assert end.state == types_pb2.RUN_STATE_SUCCEEDED, end
    assert out[runner_pb2.LOG_STREAM_STDOUT].decode().strip() == digest
    (entry,) = end.outcome.outputs.entries
    assert (entry.size, entry.sha256) == (len(body), digest)
    download = caller.artifacts.CreateDownload(artifacts_pb2.CreateDownloadRequest(uri=entry.uri), timeout=30)
    assert download.size == len(body)
    status, copy = caller.send(download.url)
    assert status == 200 and copy == body
    status, part = caller.send(download.url, headers={"Range": "bytes=1000000-1000009"})
    assert status == 206 and part == body[1000000:1000010]


def check_chain(caller):
    """Five runs, each of which takes what the one before stored."""
    run_id = caller.run(
        "sh",
        "-c",
        "mkdir /outputs/d; echo 1 | tee /outputs/d/1 > /outputs/log.txt",
        outputs=[
            types_pb2.Output(path="/outputs/d", required=True),
            types_pb2.Output(path="/outputs/*.txt", glob=True, required=True),
        ],
    )
    for n in range(2, 6):
        _, end = caller.finish(run_id)
        assert end.state == types_pb2.RUN_STATE_SUCCEEDED, end
        run_id = caller.run(
            "sh",
            "-c",
            f"cp -r /inputs/before/. /outputs; echo {n} | tee /outputs/d/{n} >> /outputs/log.txt; cat /outputs/log.txt",
            inputs=[types_pb2.Input(path="/inputs/before", uri=f"run:{run_id}/outputs")],
            outputs=[
                types_pb2.Output(path="/outputs/d", required=True),
                types_pb2.Output(path="/outputs/*.txt", glob=True, required=True),
            ],
        )
    out, end = caller.finish(run_id)
    assert end.state == types_pb2.RUN_STATE_SUCCEEDED, end
    assert out[runner_pb2.LOG_STREAM_STDOUT] == b"1\n2\n3\n4\n5\n", out
    files = sorted(e.path for e in end.outcome.outputs.entries if e.kind == types_pb2.ManifestEntry.KIND_FILE)
    assert files == ["1", "2", "3", "4", "5", "log.txt"], files
    (log,) = [entry for entry in end.outcome.outputs.entries if entry.base]
    assert (log.base, log.output) == ("/outputs", "/outputs/*.txt"), log


def check_backends(caller):
    backends = caller.admin.ListBackends(admin_pb2.ListBackendsRequest(), timeout=30).backends
    assert [backend.kind for backend in backends if backend.healthy], backends


CHECKS = [
    check_run_and_streams,
    check_same_id_same_run,
    check_cancel,
    check_typed_errors,
    check_artifacts,
    check_chain,
    check_backends,
    check_resume_inside_a_large_log,
]


def main():
    caller = Caller(sys.argv[1])
    failed = 0
    named = sys.argv[2:]
    for check in CHECKS:
        if named and check.__name__ not in named:
            continue
        started = time.monotonic()
        try:
            check(caller)
            print(f"ok      {check.__name__} ({time.monotonic() - started:.1f} s)", flush=True)
        except Exception:
            failed += 1
            print(f"FAILED  {check.__name__}", flush=True)
            traceback.print_exc(file=sys.stdout)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

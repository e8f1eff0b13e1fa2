"""Several processes: whoever starts them, they find each other, share the work, and learn what one process learns.

No test has a cluster: each sets the variables that srun, mpirun or a TPU's host would set, and a small server stands in
for the TPU's metadata. Processes, sockets and collectives are real.
"""

import dataclasses
import http.server
import json
import os
import re
import socket
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest

from vla_jax.training.checkpoints import load_policy
from vla_jax.training.mesh import MeshConfig
from vla_jax.training.metrics import metric_lines
from vla_jax.training.trainer import train as run

# Where JAX sees no chip of a TPU, it sets TPU_SKIP_MDS_QUERY: "do not ask for metadata".
MEET = """
import json, os, sys
import jax
if "GCE_METADATA_IP" in os.environ:
    del os.environ["TPU_SKIP_MDS_QUERY"]
from vla_jax.platform import any_process, is_first, start_processes, wait_for_all
start_processes(*(sys.argv[1:] or [None] * 3), autodetect=len(sys.argv) == 1)
wait_for_all("here")
print("only the first one prints")
seen = [any_process(jax.process_index() == who) for who in range(3)]
visible = jax.config._read("jax_cuda_visible_devices")
print(json.dumps([jax.process_index(), jax.process_count(), is_first(), seen, visible]), file=sys.stderr)
"""


def free_port(first: int = 0, last: int = 0) -> int:
    """A port that nobody listens at; between `first` and `last`, where those are given."""
    for port in range(first, last + 1):
        with socket.socket() as probe:
            try:
                probe.bind(("localhost", port))
            except OSError:
                continue
            return probe.getsockname()[1]
    raise OSError("no port is free")


def job_number() -> int:
    """The number of a job for which JAX takes a free port: it adds 61440 to what the number leaves modulo 4096."""
    return free_port(61440 + os.getpid() % 2000, 65535) - 61440


def srun(nodes: str, count: int) -> list[dict[str, str]]:
    """The environment of both tasks of a job step on `count` nodes."""
    step = {"SLURM_JOB_ID": str(job_number()), "SLURM_STEP_NODELIST": nodes, "SLURM_STEP_NUM_NODES": str(count)}
    places = [{"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i if count == 1 else 0)} for i in range(2)]
    return [{**step, "SLURM_NTASKS": "2", **place} for place in places]


def mpirun(local: int) -> list[dict[str, str]]:
    """The same of Open MPI, `local` processes on a node, started in an allocation of SLURM for two nodes."""
    job = {"OMPI_MCA_orte_hnp_uri": f"{job_number() * 4096}.0;tcp://127.0.0.1:1", "OMPI_COMM_WORLD_SIZE": "2"}
    job |= {"OMPI_COMM_WORLD_LOCAL_SIZE": str(local), "SLURM_STEP_NUM_NODES": "2", "SLURM_NTASKS": "2"}
    return [{**job, "OMPI_COMM_WORLD_RANK": str(i), "OMPI_COMM_WORLD_LOCAL_RANK": str(i % local)} for i in range(2)]


def tpu(**variables) -> list[dict[str, str]]:
    """The same of two hosts of TPUs; {i} is the number of the host."""
    given = {"JAX_FORCE_TPU_INIT": "1", "JAX_COORDINATOR_PORT": str(free_port()), **variables}
    return [{name: value.format(i=i) for name, value in given.items()} for i in range(2)]


def start_both(environments: list[dict[str, str]], *arguments: tuple[str, ...]) -> list[str]:
    """The last line that each of two processes wrote to its standard error."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "OMPI_", "MEGASCALE_", "TPU_"))}
    clean |= {"JAX_PLATFORMS": "cpu", "NO_PROXY": "*"}
    arguments = arguments or [()] * 2
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", MEET, *own], env={**clean, **environment}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for own, environment in zip(arguments, environments, strict=True)
    ]  # fmt: skip
    try:
        outputs = [process.communicate(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for (out, _), process in zip(outputs, processes, strict=True):
        printed = "only the first one prints" in out
        assert printed == (process is processes[0] and process.returncode == 0), outputs
    return [err.splitlines()[-1] for _, err in outputs]


def both(*visible: str) -> list[str]:
    """As MEET writes: two processes know who they are and hear each other, with these GPUs of their nodes."""
    return [json.dumps([i, 2, i == 0, [True, True, False], visible[i]]) for i in range(2)]


def test_a_task_of_slurm_that_has_a_node_for_itself_takes_all_its_gpus():
    assert start_both(srun("localhost,another", count=2)) == both("all", "all")


@pytest.mark.slow
def test_of_tasks_on_one_node_each_takes_a_gpu():
    assert start_both(srun("localhost", count=1)) == both("0", "1")


@pytest.mark.slow
@pytest.mark.parametrize(("local", "visible"), [(1, ("all", "all")), (2, ("0", "1"))])
def test_open_mpi(local, visible):
    assert start_both(mpirun(local)) == both(*visible)


@pytest.mark.slow
def test_a_coordinator_that_is_given_counts_more_than_the_cluster():
    where = f"localhost:{free_port()}"
    environments = srun("no_such_node", count=1)
    assert start_both(environments, *((where, "2", str(i)) for i in range(2))) == both("all", "all")


@pytest.mark.slow
@pytest.mark.parametrize("slices", [1, 2])
def test_hosts_of_a_tpu_that_are_told_by_their_environment(slices):
    """As Kubernetes tells them: one slice of two hosts, or two slices of one."""
    if slices == 1:
        told = dict(TPU_WORKER_ID="{i}", TPU_WORKER_HOSTNAMES="localhost,another", MEGASCALE_NUM_SLICES="1")
        told |= dict(MEGASCALE_COORDINATOR_ADDRESS="", MEGASCALE_SLICE_ID="0")
    else:
        told = dict(TPU_WORKER_ID="0", TPU_WORKER_HOSTNAMES="localhost", MEGASCALE_NUM_SLICES="2")
        told |= dict(MEGASCALE_COORDINATOR_ADDRESS="localhost:8080", MEGASCALE_SLICE_ID="{i}")
    assert start_both(tpu(**told)) == both("all", "all")


def test_no_cluster_is_an_error_that_says_what_to_give():
    """Neither where nothing says who is who, nor where a TPU's metadata should and nobody answers."""
    silent = tpu(GCE_METADATA_IP=f"127.0.0.1:{free_port()}")[0]
    for line in start_both([{}, silent]):
        assert re.search(r"UserError: --distributed found neither .*: give --coordinator", line), line


@pytest.fixture
def metadata():
    """Addresses of the metadata servers of two hosts of a TPU; each host has its own."""
    servers = []
    for number in range(2):
        values = {"agent-worker-number": str(number), "worker-network-endpoints": "a:b:127.0.0.1,a:b:127.0.0.2"}
        values["tpu-env"] = "ACCELERATOR_TYPE: 'v5litepod-16'\n"

        class Answer(http.server.BaseHTTPRequestHandler):
            def do_GET(self, values=values):  # noqa: N802 (the name is the server's)
                value = values.get(self.path.removeprefix("/computeMetadata/v1/instance/attributes/"))
                self.send_response(404 if value is None else 200)
                self.end_headers()
                self.wfile.write((value or "").encode())

            def log_message(self, *_):
                pass

        servers.append(http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
    yield ["{}:{}".format(*server.server_address) for server in servers]
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.slow
def test_hosts_of_a_tpu_that_ask_for_their_metadata(metadata):
    environments = [{**own, "GCE_METADATA_IP": where} for own, where in zip(tpu(), metadata, strict=True)]
    assert start_both(environments) == both("all", "all")


@pytest.mark.slow
@pytest.mark.parametrize("told", ["by hand", "by srun"])
def test_two_processes_learn_what_one_learns(config, start, tmp_path, monkeypatch, told):
    optimizer = dataclasses.replace(config.optimizer, epsilon=1e-2)  # see meshes.py
    config = dataclasses.replace(config, optimizer=optimizer, steps=5, checkpoint_every=5)
    one = run(config, tmp_path / "one")
    split = dataclasses.replace(config, mesh=MeshConfig(data=1, fsdp=0))
    where, tasks, processes = f"--coordinator=localhost:{free_port()}", srun("localhost,another", count=2), []
    for index, task in enumerate(tasks):
        flags = [where, "--processes=2", f"--process={index}"] if told == "by hand" else ["--distributed"]
        for name, value in task.items() if told == "by srun" else ():
            monkeypatch.setenv(name, value)
        processes.append(start(split, f"--workdir={tmp_path / 'two'}", *flags))
    outputs = [process.communicate(timeout=550) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert "mesh: data=1 fsdp=2" in outputs[0][0] and "step 5/5" in outputs[0][0]
    assert "mesh:" not in outputs[1][0] and "step" not in outputs[1][0]  # only the first one prints
    ours, theirs = metric_lines(one), metric_lines(tmp_path / "two")
    assert [line["step"] for line in theirs] == [line["step"] for line in ours]
    for name in ("loss", "terms/fm_posterior", "terms/llr"):
        np.testing.assert_allclose([line[name] for line in theirs], [line[name] for line in ours], rtol=1e-4, atol=1e-6)
    # What two processes saved is loaded by one.
    policies = [load_policy(path)[0] for path in (one, tmp_path / "two")]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), *policies)

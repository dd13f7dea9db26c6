"""What this machine has; and one switch for every fast path."""

import os
import subprocess
import sys

import pytest
import torch

from labkit import hardware
from labkit.hardware import (
    best_device,
    compute_dtype,
    fast_paths,
    limits,
    memory_bytes,
    product_dtype,
    set_fast,
    switch,
)
from labkit.quant import kernels
from labkit.sweeps import processes


def test_on_a_cpu_everything_is_fp32_but_the_products_of_one_with_matrix_units(monkeypatch):
    for units, expected in ((False, torch.float32), (True, torch.bfloat16)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda units=units: {"amx_bf16": units})
        assert compute_dtype("cpu") == torch.float32
        assert product_dtype("cpu") == expected


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), torch.float32), ((8, 0), torch.bfloat16)])
def test_on_a_gpu_bf16_is_for_those_that_have_it_in_hardware(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert compute_dtype("cuda") == product_dtype("cuda") == expected


def test_the_best_device_is_one_that_is_there():
    assert torch.zeros(1, device=best_device()).item() == 0
    assert memory_bytes() > 2**28


def test_the_switch_turns_off_every_fast_path():
    assert fast_paths()
    set_fast(False)
    try:
        assert not fast_paths() and not kernels.fast_for(torch.zeros(1))
    finally:
        set_fast(True)
    assert fast_paths() and kernels.fast_for(torch.zeros(1))


@pytest.mark.parametrize(
    ("value", "expected"),
    [("0", "False"), ("no", "False"), ("False", "False"), ("1", "True"), ("on", "True"), ("", "True")],
)
def test_the_environment_decides_at_the_start(value, expected):
    code = "from labkit.hardware import fast_paths; print(fast_paths())"
    environment = os.environ | {"LABKIT_FAST": value, "PYTHONPATH": os.getcwd()}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == expected, done.stderr


@pytest.mark.parametrize("value", ["2", "nope", "ja", "-1", "True!"])
def test_a_switch_that_says_neither_yes_nor_no_is_an_error_that_names_it(value, monkeypatch):
    monkeypatch.setenv("LABKIT_ANY", value)
    with pytest.raises(ValueError, match=f"LABKIT_ANY='{value}' is neither yes .1, true, yes, on. nor no"):
        switch("LABKIT_ANY", True)


@pytest.mark.parametrize("default", [True, False, None])
def test_a_switch_that_is_not_set_or_empty_has_its_default(default, monkeypatch):
    for value in (None, "", "  "):
        if value is None:
            monkeypatch.delenv("LABKIT_ANY", raising=False)
        else:
            monkeypatch.setenv("LABKIT_ANY", value)
        assert switch("LABKIT_ANY", default) is default
    for value, expected in ((" TRUE ", True), ("Yes", True), ("off", False), ("0", False)):
        monkeypatch.setenv("LABKIT_ANY", value)
        assert switch("LABKIT_ANY", default) is expected


# --- limits of a container

GB = 2**30
TWO = {"sys/fs/cgroup/cgroup.controllers": "cpu memory"}
STAT = "anon 5\ninactive_file 1073741824\n"


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine of 64 GiB and 16 processors, with the files that it is given."""
    monkeypatch.setattr(hardware, "physical_memory", lambda: 64 * GB)
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)

    def made(files, available=60):
        for name, text in (
            files | {"proc/meminfo": f"MemTotal: 1 kB\nMemAvailable: {available * 2**20} kB\n"}
        ).items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return limits(tmp_path)

    return made


def test_without_control_groups_it_is_the_machine(machine):
    found = machine({})
    assert (found.cpus, found.memory, found.free, found.contained) == (16, 64 * GB, 60 * GB, False)


def test_version_2_limits_memory_and_processors(machine):
    found = machine(
        {
            "proc/self/cgroup": "0::/\n",
            "sys/fs/cgroup/memory.max": f"{4 * GB}\n",
            "sys/fs/cgroup/memory.current": f"{3 * GB}\n",
            "sys/fs/cgroup/memory.stat": STAT,
            "sys/fs/cgroup/cpu.max": "250000 100000\n",
        }
    )
    assert (found.cpus, found.memory, found.free, found.contained) == (2, 4 * GB, 2 * GB, True)


def test_the_tightest_of_nested_groups_counts_and_max_is_no_limit(machine):
    found = machine(
        {
            "proc/self/cgroup": "0::/user.slice/job/step\n",
            "sys/fs/cgroup/user.slice/job/step/memory.max": "max\n",
            "sys/fs/cgroup/user.slice/job/step/cpu.max": "max 100000\n",
            "sys/fs/cgroup/user.slice/job/memory.max": f"{8 * GB}\n",
            "sys/fs/cgroup/user.slice/memory.max": f"{32 * GB}\n",
            "sys/fs/cgroup/user.slice/cpu.max": "50000 100000\n",
        }
    )
    assert (found.cpus, found.memory, found.free) == (1, 8 * GB, 8 * GB)


@pytest.mark.parametrize("path", ["/docker/0123abcd", "/"])
def test_version_1_limits_too_also_where_its_path_is_the_hosts(machine, path):
    found = machine(
        {
            "proc/self/cgroup": f"5:cpu,cpuacct:{path}\n4:memory:{path}\n3:cpuset:{path}\nnonsense\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{2 * GB}\n",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{GB}\n",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "400000\n",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
        }
    )
    assert (found.cpus, found.memory, found.free) == (4, 2 * GB, GB)


def test_version_1_without_limits_is_the_machine(machine):
    found = machine(
        {
            "proc/self/cgroup": "4:memory:/\n1:cpu:/\n0::/\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": "1\n",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
        }
    )
    assert found == hardware.Limits(16, 64 * GB, 60 * GB, contained=False)


@pytest.mark.parametrize("text", ["", "x", "-5", "max max", "1 2 3"])
def test_nonsense_in_its_files_is_no_limit_that_stops_anything(machine, text):
    names = ("proc/self/cgroup", "sys/fs/cgroup/memory.stat", "sys/fs/cgroup/cpu.max")
    found = machine(dict.fromkeys(names, text) | {"sys/fs/cgroup/memory.max": "x"})
    assert found.cpus >= 1 and found.memory == 64 * GB


def test_affinity_is_a_limit(machine, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {2, 5, 7}, raising=False)
    assert machine({}).cpus == 3 and machine({}).contained


def test_on_this_machine_the_limits_are_within_what_psutil_sees():
    psutil = pytest.importorskip("psutil")
    found = limits()
    assert 1 <= found.cpus <= len(psutil.Process().cpu_affinity())
    assert 0 < found.free <= found.memory <= psutil.virtual_memory().total


@pytest.mark.parametrize(
    ("cpus", "memory", "jobs"), [(16, 64, 16), (2, 64, 2), (16, 9, 2), (16, 1, 1), (1, 64, 1)]
)
def test_a_sweep_has_as_many_processes_as_the_container_allows(monkeypatch, cpus, memory, jobs):
    allowed = hardware.Limits(cpus, memory * GB, memory * GB, contained=True)
    monkeypatch.setattr(hardware, "limits", lambda: allowed)
    monkeypatch.setattr(processes, "limits", lambda: allowed)
    monkeypatch.setattr(processes, "best_device", lambda: torch.device("cpu"))
    assert processes.default_jobs() == jobs

"""How processes find each other: the launchers' variables, starting them, and how a job of several ends."""

from __future__ import annotations

import pytest

from atfr.engine.place import Place, find_place, hosts

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29400"}
# The sixth of eight tasks, the second one of the third of three machines; a batch script's own variables are there too.
SRUN = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "2",
    "SLURM_NTASKS": "8",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_JOB_NODELIST": "login,node[07-09]",
    "SLURM_STEP_NODELIST": "node[07-08],gpu2",
}


def test_torchruns_variables_are_taken_also_inside_a_slurm_step():
    place = find_place({**SRUN, **TORCHRUN})
    assert place == Place("torchrun", 3, 4, 1, "10.0.0.1", 29400)
    assert find_place({**TORCHRUN, "RANK": "0"}).keeps_store
    assert not find_place({**TORCHRUN, "RANK": "0", "TORCHELASTIC_USE_AGENT_STORE": "True"}).keeps_store


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"])
def test_a_variable_of_torchrun_that_is_missing_is_named(name):
    with pytest.raises(ValueError, match=f"but not {name}: start with torchrun"):
        find_place({key: value for key, value in TORCHRUN.items() if key != name})


def test_a_task_of_srun_meets_the_others_on_the_first_host_of_its_step():
    place = find_place(SRUN)
    assert (place.launcher, place.rank, place.world, place.local_rank, place.address) == ("srun", 5, 8, 1, "node07")
    assert not place.keeps_store and find_place({**SRUN, "SLURM_PROCID": "0"}).keeps_store


def test_steps_and_jobs_that_run_side_by_side_get_ports_of_their_own():
    found = {find_place({**SRUN, "SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)}).port for job in range(4700, 4800) for step in range(8)}
    assert len(found) == 100 * 8 and 1024 < min(found) and max(found) < 32768
    assert len({find_place({**SRUN, "SLURM_PROCID": str(rank)}).port for rank in range(8)}) == 1


@pytest.mark.parametrize("name", ["SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NODELIST", "SLURM_JOB_ID", "SLURM_STEP_ID"])
def test_a_variable_of_srun_that_is_missing_is_named(name):
    with pytest.raises(ValueError, match=f"but {name} is not set"):
        find_place({key: value for key, value in SRUN.items() if key != name})


def test_a_variable_that_is_no_number_is_named():
    with pytest.raises(ValueError, match="SLURM_PROCID='first' is not a number"):
        find_place({**SRUN, "SLURM_PROCID": "first"})
    with pytest.raises(ValueError, match="WORLD_SIZE='' is not a number"):
        find_place({**TORCHRUN, "WORLD_SIZE": ""})


@pytest.mark.parametrize("environment", [{}, {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, {**SRUN, "SLURM_STEP_NUM_TASKS": "1"}])
def test_no_launcher_a_batch_script_and_a_step_of_one_task_are_one_process(environment):
    assert find_place(environment) == Place("none", rank=0, world=1, local_rank=0)


@pytest.mark.parametrize(
    "nodelist,expected",
    [
        ("node[01-03,7],gpu2", ["node01", "node02", "node03", "node7", "gpu2"]),
        ("127.0.0.[1-2]", ["127.0.0.1", "127.0.0.2"]),
        ("n[9-11]", ["n9", "n10", "n11"]),
        ("n[099-101]-ib", ["n099-ib", "n100-ib", "n101-ib"]),
        ("rack[1-2]n[3,5]", ["rack1n3", "rack1n5", "rack2n3", "rack2n5"]),
        ("a-b.c,d", ["a-b.c", "d"]),
    ],
)
def test_a_list_of_hosts_is_written_out(nodelist, expected):
    assert hosts(nodelist) == expected


@pytest.mark.parametrize("nodelist", ["", "node[1-", "node[a-b]", "node[]"])
def test_what_is_no_list_of_hosts_is_refused(nodelist):
    with pytest.raises(ValueError, match="SLURM_STEP_NODELIST="):
        hosts(nodelist)


def test_a_process_computes_on_its_own_gpu_and_on_the_only_one_that_srun_shows_it():
    assert find_place(TORCHRUN).device_index(gpus=2) == 1
    assert find_place(SRUN).device_index(gpus=4) == 1
    assert find_place(SRUN).device_index(gpus=1) == 0
    with pytest.raises(ValueError, match="process 1 of this machine has no GPU, torch sees 1"):
        find_place(TORCHRUN).device_index(gpus=1)

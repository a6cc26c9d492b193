"""Which GPUs a SLURM task takes."""

import pytest

from train import cluster

NODE = {
    "SLURM_STEP_TASKS_PER_NODE": "1(x4)",
    "SLURM_NODEID": "2",
    "SLURM_LOCALID": "0",
    "SLURM_GPUS_ON_NODE": "8",
}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, list(range(8))),
        ({"CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"}, list(range(8))),
        ({"SLURM_STEP_TASKS_PER_NODE": "8(x4)", "SLURM_LOCALID": "5"}, [5]),
        ({"SLURM_STEP_TASKS_PER_NODE": "4,1,2", "SLURM_LOCALID": "1"}, [4, 5, 6, 7]),
        # Bound: this task sees two of the eight, as its numbers 0 and 1.
        (
            {
                "SLURM_STEP_TASKS_PER_NODE": "4(x4)",
                "SLURM_LOCALID": "3",
                "CUDA_VISIBLE_DEVICES": "6,7",
            },
            [0, 1],
        ),
        ({"JAX_LOCAL_DEVICE_IDS": "0,1"}, None),
        ({"SLURM_GPUS_ON_NODE": ""}, None),
        ({"SLURM_STEP_TASKS_PER_NODE": "3(x4)"}, None),
    ],
)
def test_the_tasks_of_a_node_share_its_gpus(changes, expected):
    assert cluster.slurm_gpus(NODE | changes) == expected


def test_outside_of_slurm_nothing_is_said():
    assert cluster.slurm_gpus({"CUDA_VISIBLE_DEVICES": "0"}) is None


def test_a_job_of_several_tasks_must_be_started_by_srun(monkeypatch):
    monkeypatch.setenv("SLURM_NTASKS", "4")
    monkeypatch.delenv("SLURM_STEP_NODELIST", raising=False)
    with pytest.raises(ValueError, match="has 4 tasks: start the command with `srun`"):
        cluster.connect(None, None, None)


SAME = "processes must be given the same:"


@pytest.mark.parametrize(
    ("everyone", "own", "expected"),
    [
        ([("", 2, {"a": 1}), ("", 2, {"a": 1})], 0, ("", 0)),
        ([("", 2, {}), ("no data", 1, {})], 0, ("process 1: no data", 1)),
        ([("", 2, {}), ("no data", 1, {})], 1, ("no data", 1)),
        ([("here too", 2, {}), ("no data", 1, {})], 1, ("no data", 1)),
        (
            [("", 2, {"a": 1}), ("", 2, {})],
            1,
            (f"{SAME} process 1 has a=null, process 0 has a=1.", 2),
        ),
        (
            [("", 2, {"a": 1, "b": [2]}), ("", 2, {"a": 1, "b": [3]})],
            0,
            (f"{SAME} process 1 has b=[3], process 0 has b=[2].", 2),
        ),
    ],
)
def test_each_process_says_its_own_mistake_or_another_one_s(everyone, own, expected):
    assert cluster.disagreement(everyone, own) == expected


def test_one_process_has_only_itself_to_agree_with():
    def wrong(error):
        raise error

    assert cluster.together(lambda: 3, facts=lambda result: {"a": result}) == 3
    with pytest.raises(cluster.AgreedError, match=r"^no data$") as caught:
        cluster.together(lambda: wrong(OSError("no data\nmore")), (OSError,), lambda error: 7)
    assert caught.value.status == 7
    with pytest.raises(ZeroDivisionError):
        cluster.together(lambda: wrong(ZeroDivisionError()), (OSError,))

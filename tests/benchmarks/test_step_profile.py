"""The profile of a model's steps, on a CPU: operations in place of kernels."""

import re

from benchmarks import step_profile


def test_command_lists_what_each_step_spends_its_time_on_the_slowest_first(capsys):
    step_profile.main(["--models", "mdm_t2i_tiny", "--batch", "1", "--dtype", "fp32", "--device", "cpu", "--most", "5"])
    sampling, training = re.split(r"mdm_t2i_tiny, 1×32², \w+ step: ", capsys.readouterr().out)[1:]
    for listed in (sampling, training):
        total, *lines = listed.splitlines()
        times = [float(line.split()[0]) for line in lines]
        assert len(times) == 5
        assert times == sorted(times, reverse=True)
        assert 0 < sum(times) <= float(total.split()[0]) + 0.01
    assert "convolution" in sampling
    assert "backward" in training.lower()

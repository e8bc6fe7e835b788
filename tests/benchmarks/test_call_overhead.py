import re

from benchmarks import call_overhead


def test_command_prints_what_a_call_of_each_op_costs(capsys):
    call_overhead.main(["--seconds", "0"])
    header, *rows = capsys.readouterr().out.splitlines()
    assert "forward + backward" in header
    assert {re.split(r"[ ,]", row)[0] for row in rows} == {
        "flash_attention",
        "group_norm_silu",
        "multires_loss",
        "multires_noise",
        "self_cross_attention",
        "temporal_attention",
    }
    assert all(float(cost) > 0 for row in rows for cost in re.findall(r"\d+\.\d", row))

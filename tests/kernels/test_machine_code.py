"""Instructions and occupancy, from lines as nvdisasm and LLVM print them."""

import pytest

from mdm_kernels.aot.machine_code import (
    TARGETS,
    amd_instructions,
    nvidia_instructions,
    occupancy,
    rounding_products,
)

SASS = """
.section .text.kernel
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0850*/                   HFMA2.MMA R55, -RZ, RZ, 0, 0 ;
        /*0a10*/              @!P0 LDG.E.128 R4, desc[UR6][R2.64] ;
        /*0a20*/              @UP0 LDG.E.LTC128B.128.CONSTANT R4, desc[UR6][R2.64] ;
        /*0a30*/                   LDG.E.LTC128B R4, desc[UR6][R2.64] ;
        /*0a40*/                   LDG.E.U16 R4, desc[UR6][R2.64] ;
        /*0a50*/                   LDGSTS.E.BYPASS.128 [R4], desc[UR6][R2.64], P1 ;
        /*0a60*/                   LDGDEPBAR ;
        /*0a70*/                   LDS.128 R4, [R3] ;
        /*0b00*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0b10*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], RZ, !UPT ;
        /*0b20*/                   UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR8], tmem[UR10], idesc[UR11], UP1 ;
        /*0c00*/                   STG.E.128 desc[UR6][R2.64], R4 ;
        /*0c10*/               @P0 STG.E desc[UR6][R2.64], R4 ;
"""

GCN = """
kernel:
	s_load_dwordx4 s[0:3], s[4:5], 0x0
	global_load_dwordx4 v[0:3], v[4:5], off
	buffer_load_dwordx4 v[0:3], v2, s[4:7], 0 offen
	buffer_load_dwordx2 v[0:1], v2, s[4:7], 0 offen
	ds_read_b128 v[0:3], v8
	v_mfma_f32_32x32x8_bf16 a[0:15], v[0:1], v[2:3], a[0:15]
	global_store_dwordx4 v[4:5], v[0:3], off
	buffer_store_short v0, v2, s[4:7], 0 offen
"""


def test_nvidia_instructions_are_counted():
    counts = {"instructions": 14, "loads": 5, "wide_loads": 3, "stores": 2, "wide_stores": 1, "matrix": 3}
    assert nvidia_instructions(SASS) == counts


def test_amd_instructions_are_counted():
    counts = {"instructions": 8, "loads": 3, "wide_loads": 2, "stores": 2, "wide_stores": 1, "matrix": 1}
    assert amd_instructions(GCN) == counts


@pytest.mark.parametrize(
    ("target", "registers", "shared", "tensor_memory", "warps", "expected"),
    [
        ("sm_90", 32, 0, 0, 4, 1.0),
        ("sm_90", 33, 0, 0, 4, 48 / 64),  # as 40 registers: 12 warps a scheduler
        ("sm_90", 255, 0, 0, 8, 8 / 64),
        ("sm_80", 32, 81 * 1024, 0, 8, 16 / 64),  # 2 · (81 + 1) KB are all there is
        ("sm_80", 32, 82 * 1024, 0, 8, 8 / 64),
        ("sm_100", 32, 0, 256, 4, 8 / 64),
        ("gfx942", 128, 0, 0, 4, 16 / 32),
        ("gfx942", 64, 32 * 1024, 0, 2, 4 / 32),
    ],
)
def test_occupancy_is_bound_by_the_scarcest_resource(target, registers, shared, tensor_memory, warps, expected):
    assert occupancy(TARGETS[target], registers, shared, tensor_memory, warps) == expected


def test_products_that_round_float32_to_tf32_are_counted():
    ptx = """
        mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 { %r1, %r2 }, { %r3 };
        mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 { %r1, %r2 }, { %r3 };
        wgmma.mma_async.sync.aligned.m64n64k8.f32.tf32.tf32 {%r1};
        tcgen05.mma.cta_group::1.kind::tf32 [ %r1 + 0 ], %rd1;
        fma.rn.f32 %r1, %r2, %r3, %r4;
    """
    assert rounding_products(ptx) == 3
    assert rounding_products("v_mfma_f32_16x16x8_xf32 a[0:3]\n v_mfma_f32_16x16x16_bf16 a[0:3]") == 1

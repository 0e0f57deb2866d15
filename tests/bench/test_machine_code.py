"""The reader of disassemblies, on a few lines of one."""

import importlib.util
from pathlib import Path

import pytest

PATH = Path(__file__).resolve().parents[2] / "benchmarks" / "machine_code.py"
SASS = """
.L_x_1:
   -:-:-:Y:01        /*0010*/                   MOV R2, 0x1
.L_x_2:
   -:-:-:Y:01        /*0020*/                   UIADD3 UR4, UR5, 0x2, URZ
   -:-:-:Y:01        /*0030*/                   R2UR UR42, R2
   -:-:-:Y:01        /*0040*/                   HGMMA.64x160x16.F32.BF16 R24, gdesc[UR36], R24
   -:-:-:Y:01        /*0050*/                   HGMMA.64x160x16.F32.BF16 R24, gdesc[UR40], R24, gsb0
   -:-:-:Y:01        /*0060*/               @P0 LDL R3, [R1+0x4]
   -:-:-:Y:05        /*0070*/              @!P4 BRA `(.L_x_2)
   -:-:-:Y:05        /*0080*/              @!P2 BRA `(.L_x_1)
   -:-:-:Y:05        /*0090*/                   BRA `(.L_x_9)
"""


@pytest.fixture(scope="module")
def machine_code():
    spec = importlib.util.spec_from_file_location("machine_code", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_innermost_loops_are_counted(machine_code):
    found = machine_code.loops(SASS)
    assert found == [machine_code.Loop(columns=160, products=2, uniform=1, vector=3, moves=1, spills=1)]
    assert machine_code.loops(SASS.replace("HGMMA", "FFMA")) == []


@pytest.mark.parametrize(
    ("name", "tile_rows"), [("fp8_channel", 144), ("fp8_weight_block", 64), ("nvfp4", 8), ("mxfp4_fp8", 64)]
)
def test_the_kernel_of_a_number_format(machine_code, name, tile_rows):
    module, config = machine_code.kernel_of("up", tile_rows, 256, 256, {"stages": 2}, name)
    assert isinstance(module, bytes) and (config.tile_rows, config.stages) == (tile_rows, 2)


def test_the_loop_that_decodes_is_counted(machine_code):
    permuted = "   -:-:-:Y:01        /*0010*/                   PRMT R2, R3, R4, R5\n" * 40
    loop = f".L_x_5:\n{permuted}   -:-:-:Y:01        /*0020*/                   USEL UR1, UR2, URZ, UP0\n"
    loop += "   -:-:-:Y:05        /*0030*/              @P0 BRA `(.L_x_5)\n"
    found = {"uniform": 1, "vector": 41, "permutations": 40, "spills": 0}
    assert machine_code.decoding_loop(SASS + loop) == found
    assert machine_code.decoding_loop(SASS) is None


def test_the_kernel_of_a_weight_gradient(machine_code):
    module, config = machine_code.kernel_of("weight_grad", 160, 256, 512, {"stages": 2})
    assert isinstance(module, bytes) and (config.tile, config.stages) == ((128, 256), 2)

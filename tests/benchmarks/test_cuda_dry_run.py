"""The stubs of CUDA that a dry run loads: what they say of a GPU, their memory, and what they count."""

import ctypes
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cuda_dry_run import CALLS, build_stubs, print_calls

pytestmark = pytest.mark.skipif(not all(map(shutil.which, ("gcc", "nm", "readelf"))), reason="no gcc or binutils")

PROVIDER = """
int cudaMalloc(void **, unsigned long), cudaMemcpy(void *, const void *, unsigned long, int), cudaStreamQuery(void *);
int cudaGetDeviceProperties(char *, int), cublasCreate_v2(void **), cublasGemmEx(void *), cudaLaunchKernel(void *);
void __cudaRegisterFunction(void **, const void *, char *, const char *);
static const char names[] = "\\0cudnnCreate\\0cudnnReduceTensor\\0";
static int kernel;
int run(void) {
  char properties[1024], source[3] = {1, 2, 3};
  void *handle = 0;
  char *memory = 0;
  __cudaRegisterFunction(0, &kernel, 0, "_Z4scalIfEvT_");
  if (cudaGetDeviceProperties(properties, 0)) return 1;
  if (*(int *)(properties + 360) != 8 || *(int *)(properties + 364) != 9) return 1;
  if (cublasCreate_v2(&handle) || handle == 0 || cublasGemmEx(handle)) return 2;
  if (cudaMalloc((void **)&memory, 3) || (unsigned long)memory % 256 || cudaMemcpy(memory, source, 3, 1)) return 3;
  if (memory[2] != 3 || cudaStreamQuery(0)) return 4;
  return names[1] != 'c' || cudaLaunchKernel(&kernel) || cudaLaunchKernel(&kernel);
}
"""
RUN = "import ctypes, sys; sys.exit(ctypes.CDLL(sys.argv[1]).run())"


def test_a_library_that_needs_cuda_runs_on_the_stubs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sonames = ("libcudart.so.13", "libcublas.so.13")
    for soname, names in zip(sonames, ("cuda", "cublas"), strict=True):  # what a toolkit has, to link against
        symbols = [name for name in set(PROVIDER.replace("(", " ").split()) if name.strip("_").startswith(names)]
        source, script = tmp_path / "toolkit.c", tmp_path / "toolkit.map"
        source.write_text("".join(f"int {name}(void) {{ return 9; }}\n" for name in symbols))
        script.write_text(f"{soname} {{ *; }};")
        flags = ["-w", "-shared", "-fPIC", f"-Wl,-soname,{soname},--version-script={script}"]
        subprocess.run(["gcc", *flags, "-o", tmp_path / soname, source], check=True)
    (tmp_path / "provider.c").write_text(PROVIDER)
    provider = tmp_path / "provider.so"
    libraries = [tmp_path / soname for soname in sonames]
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", provider, tmp_path / "provider.c", *libraries], check=True)

    stubs = tmp_path / "stubs"
    stubs.mkdir()
    build_stubs(provider, stubs, sm=89)
    assert {*sonames, "libcudnn.so.9"} <= {path.name for path in stubs.iterdir()}
    cudnn = ctypes.CDLL(str(stubs / "libcudnn.so.9"))
    assert cudnn.cudnnReduceTensor() == 0
    environment = {"LD_LIBRARY_PATH": str(stubs), CALLS: str(tmp_path / "calls")}
    done = subprocess.run([sys.executable, "-c", RUN, provider], env=environment, check=False)
    assert done.returncode == 0
    print_calls(tmp_path / "calls")
    printed = capsys.readouterr().out
    assert "copy to the GPU: 1" in printed
    assert "3 launches of 2 kinds" in printed
    assert "2 scal" in printed
    assert "1 cublasGemmEx" in printed

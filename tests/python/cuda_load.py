"""A load on an NVIDIA device that needs nothing but the driver: CUDA's driver API by ctypes, a kernel as text.

Usage: cuda_load.py MEMORY spin|idle

Takes MEMORY bytes of the device (CUDA_VISIBLE_DEVICES chooses it), computes once and checks what came out, prints a line of JSON, and then
computes without a pause (spin) or does nothing (idle), until it is killed; after ten minutes it ends by itself. What fails is told on stderr
in the driver's words, with exit status 1.
"""

import ctypes
import json
import sys
import time

LIMIT = 600
# Threads of a launch: some blocks for every multiprocessor of today's devices.
BLOCKS, THREADS = 1056, 256
# How long a launch takes, and how many are on their way at a time, so that the device never waits for this program.
LAUNCH, AHEAD = 0.02, 32
# Every thread steps a generator of numbers, as often as it is told; what it arrives at is known beforehand.
STEP, PLUS, MASK = 1664525, 1013904223, 0xFFFFFFFF
KERNEL = """
.version {version}
.target {target}
.address_size 64
.visible .entry spin(.param .u64 out, .param .u32 rounds)
{{
    .reg .pred %p<2>;
    .reg .b32 %r<7>;
    .reg .b64 %rd<4>;
    ld.param.u64 %rd1, [out];
    ld.param.u32 %r1, [rounds];
    cvta.to.global.u64 %rd1, %rd1;
    mov.u32 %r2, %ctaid.x;
    mov.u32 %r3, %ntid.x;
    mov.u32 %r4, %tid.x;
    mad.lo.u32 %r5, %r2, %r3, %r4;
    mov.u32 %r6, %r5;
AGAIN:
    mad.lo.u32 %r6, %r6, {step}, {plus};
    sub.u32 %r1, %r1, 1;
    setp.ne.u32 %p1, %r1, 0;
    @%p1 bra AGAIN;
    mul.wide.u32 %rd2, %r5, 4;
    add.u64 %rd3, %rd1, %rd2;
    st.global.u32 [%rd3], %r6;
    ret;
}}
"""
# The oldest that all drivers since CUDA 9 translate, and one for drivers that have left the oldest devices.
TARGETS = [("6.0", "sm_50"), ("6.3", "sm_75")]


class Refused(Exception):
    pass


class Driver:
    def __init__(self):
        try:
            self.library = ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise Refused(f"no CUDA driver library: {error}") from None

    def __call__(self, name, *arguments):
        code = getattr(self.library, name)(*arguments)
        if code:
            text = ctypes.c_char_p()
            self.library.cuGetErrorName(code, ctypes.byref(text))
            raise Refused(f"{name}: {(text.value or b'error').decode()} ({code})")


class Load:
    def __init__(self, memory):
        self.cuda = cuda = Driver()
        cuda("cuInit", ctypes.c_uint(0))
        device, context = ctypes.c_int(), ctypes.c_void_p()
        cuda("cuDeviceGet", ctypes.byref(device), ctypes.c_int(0))
        bus = ctypes.create_string_buffer(32)
        cuda("cuDeviceGetPCIBusId", bus, ctypes.c_int(len(bus)), device)
        self.bus = bus.value.decode().lower()
        cuda("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        cuda("cuCtxSetCurrent", context)
        self.out, self.ballast = ctypes.c_uint64(), ctypes.c_uint64()
        results = BLOCKS * THREADS * 4
        cuda("cuMemAlloc_v2", ctypes.byref(self.out), ctypes.c_size_t(results))
        cuda("cuMemAlloc_v2", ctypes.byref(self.ballast), ctypes.c_size_t(memory - results))
        self.spin = self.compiled()

    def compiled(self):
        for version, target in TARGETS:
            text = KERNEL.format(version=version, target=target, step=STEP, plus=PLUS)
            module, function = ctypes.c_void_p(), ctypes.c_void_p()
            try:
                self.cuda("cuModuleLoadData", ctypes.byref(module), ctypes.c_char_p(text.encode()))
            except Refused as error:
                refusal = error
                continue
            self.cuda("cuModuleGetFunction", ctypes.byref(function), module, ctypes.c_char_p(b"spin"))
            return function
        raise refusal

    def launch(self, rounds):
        count = ctypes.c_uint32(rounds)
        arguments = (ctypes.c_void_p * 2)(*(ctypes.cast(ctypes.pointer(value), ctypes.c_void_p) for value in (self.out, count)))
        shape = [ctypes.c_uint(side) for side in (BLOCKS, 1, 1, THREADS, 1, 1, 0)]
        self.cuda("cuLaunchKernel", self.spin, *shape, None, arguments, None)

    def wait(self):
        self.cuda("cuCtxSynchronize")

    def calibrated(self):
        """Rounds that take about as long as a launch shall."""
        rounds = 1 << 10
        while True:
            # The shortest of some: on a machine under load this program is what takes long.
            took = LAUNCH
            for _ in range(3):
                began = time.monotonic()
                self.launch(rounds)
                self.wait()
                took = min(took, time.monotonic() - began)
            if took >= LAUNCH or rounds >= 1 << 30:
                return rounds
            rounds *= 2

    def check(self, rounds):
        """Whether the device has computed what it should have."""
        times, plus, step, add = 1, 0, STEP, PLUS
        for bit in range(rounds.bit_length()):
            if rounds >> bit & 1:
                times, plus = times * step & MASK, (step * plus + add) & MASK
            step, add = step * step & MASK, (step * add + add) & MASK
        results = (ctypes.c_uint32 * (BLOCKS * THREADS))()
        self.cuda("cuMemcpyDtoH_v2", results, self.out, ctypes.c_size_t(ctypes.sizeof(results)))
        for thread, found in enumerate(results):
            if found != (times * thread + plus) & MASK:
                raise Refused(f"thread {thread} has computed {found} in {rounds} rounds")


def main():
    memory, what = int(sys.argv[1]), sys.argv[2]
    ends = time.monotonic() + LIMIT
    load = Load(memory)
    rounds = load.calibrated()
    load.check(rounds)
    print(json.dumps({"bus": load.bus, "memory": memory, "rounds": rounds}), flush=True)
    while time.monotonic() < ends:
        if what == "idle":
            time.sleep(1)
            continue
        for _ in range(AHEAD):
            load.launch(rounds)
        load.wait()
    load.check(rounds)


if __name__ == "__main__":
    try:
        main()
    except Refused as error:
        sys.exit(f"cuda_load: {error}")

"""A program in name spaces of its own: network, processes, mounts."""

import os
import secrets
import signal
import subprocess
import sys
import threading

from stack.place import Place, command

INSIDE = "BAI_COMPAT_INSIDE"
ENDINGS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# Seconds that the inner program has to clean up.
GRACE = 120


def enter(program, argv, *, prepare=lambda: None, interrupt=True):
    """Prepares what needs the network, then goes on in name spaces of its own: returns only inside of them.

    Told to end, the outer program closes the inner one's standard input. `interrupt`: that raises KeyboardInterrupt in the inner one's
    main thread; else it looks for itself.
    """
    if INSIDE in os.environ:
        if interrupt:
            interrupt_at_end_of_input()
        command(["ip", "link", "set", "lo", "up"])
        return
    if os.getuid() != 0:
        sys.exit(f"{os.path.basename(program)}: needs root (name spaces, a Docker engine)")
    # Who started this may have blocked them, and the inner program would have them blocked too.
    for number in ENDINGS:
        signal.signal(number, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDINGS)
    prepare()
    token = secrets.token_hex(4)
    inner = subprocess.Popen(
        ["unshare", "--net", "--pid", "--fork", "--kill-child", "--mount-proc", "--", sys.executable, program, *argv],
        env={**os.environ, INSIDE: token},
        stdin=subprocess.PIPE,
        start_new_session=True,
    )

    def ask_to_end(_number, _frame):
        # The inner program ends when this pipe does; its first process takes all others of its name space along.
        if not inner.stdin.closed:
            inner.stdin.close()
            signal.alarm(GRACE)

    for number in ENDINGS:
        signal.signal(number, ask_to_end)
    signal.signal(signal.SIGALRM, lambda _number, _frame: inner.kill())
    result = inner.wait()
    if "--keep" not in argv:
        Place.remove(token)
    sys.exit(result)


def interrupt_at_end_of_input():
    # One that was started in the background by a shell ignores it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    main = threading.main_thread().ident
    told = sys.excepthook
    sys.excepthook = lambda kind, *rest: print("interrupted, all is cleaned up", file=sys.stderr) if kind is KeyboardInterrupt else told(kind, *rest)

    def wait():
        while os.read(0, 4096):
            pass
        # As a signal, so that a wait in the kernel ends too.
        signal.pthread_kill(main, signal.SIGINT)

    threading.Thread(target=wait, daemon=True).start()

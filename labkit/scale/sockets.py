"""What the system says that this process has sent to others: a witness that no counter of ours can mislead.

Linux keeps for each TCP connection how many bytes it has carried, `tcpi_bytes_sent`. Gloo talks TCP, also between
ranks on one machine, and puts a header of 48 bytes before each message; retransmissions count again.

Source: `include/uapi/linux/tcp.h`, struct tcp_info.
"""

import os
import socket
import struct
import sys
from contextlib import suppress
from pathlib import Path

LENGTH, SENT = 256, 200  # bytes to ask for, and where `tcpi_bytes_sent` is
HEADER = 48  # bytes before each of gloo's messages


def is_readable() -> bool:
    """Does this system say what a socket has sent?"""
    return sys.platform == "linux"


def sent_by_sockets() -> int:
    """Bytes that the open TCP connections of this process have sent so far.

    Raises:
        RuntimeError: the system does not say.
    """
    if not is_readable():
        raise RuntimeError("only Linux says what each socket has sent (TCP_INFO); count with counted=True")
    total = 0
    for entry in Path("/proc/self/fd").iterdir():
        with suppress(OSError):
            if os.readlink(entry).startswith("socket:"):
                total += sent_by(int(entry.name))
    return total


def sent_by(descriptor: int) -> int:
    """Bytes that one connection has sent; 0 of what is no TCP connection."""
    with socket.socket(fileno=os.dup(descriptor)) as one:
        if one.family not in (socket.AF_INET, socket.AF_INET6) or one.type != socket.SOCK_STREAM:
            return 0
        info = one.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, LENGTH)
    return struct.unpack_from("Q", info, SENT)[0] if len(info) >= SENT + 8 else 0

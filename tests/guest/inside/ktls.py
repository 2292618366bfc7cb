"""A connection whose kernel encrypts it; as a program, one that says ``.`` as long as that works."""

import os
import socket
import struct
import time

from tcpstate.kernel.tcp import TCP

#: include/uapi/linux/tls.h, socket.h
SOL_TLS, TLS_TX, TLS_RX = 282, 1, 2
_VERSION, _AES_GCM_128 = 0x0303, 51


def keys():
    """struct tls12_crypto_info_aes_gcm_128: version, cipher, iv, key, salt, sequence number."""
    return struct.pack("=HH8s16s4s8s", _VERSION, _AES_GCM_128, b"i" * 8, b"k" * 16, b"s" * 4, bytes(8))


def pair():
    """Over loopback; what the first sends is encrypted, and the second reads it decrypted."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname())
        served, _ = listener.accept()
    for sock, way in ((served, TLS_TX), (client, TLS_RX)):
        sock.setsockopt(socket.IPPROTO_TCP, TCP.ULP, b"tls")
        sock.setsockopt(SOL_TLS, way, keys())
    return served, client


def beat():
    served, client = pair()
    while True:
        served.sendall(b"still here")
        os.write(1, b"." if client.recv(100) == b"still here" else b"wrong")
        time.sleep(0.05)


if __name__ == "__main__":
    beat()

"""Many clients at once, of another user: crowd.py SOCKET UID COUNT

Every second one leaves half a message. Says `ready` when all have knocked, with how
many were let in, and stays until its standard input is closed.
"""

import os
import resource
import select
import socket
import sys

path, uid, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
resource.setrlimit(resource.RLIMIT_NOFILE, (count + 64, count + 64))
os.setgroups([])
os.setresgid(uid, uid, uid)
os.setresuid(uid, uid, uid)
crowd = []
for number in range(count):
    client = socket.socket(socket.AF_UNIX)
    client.connect(path)
    if number % 2:
        try:
            client.sendall(b'{"method":')
        except (BrokenPipeError, ConnectionResetError):
            pass
    crowd.append(client)
# Those turned away are at their end.
ended = 0
while True:
    readable, _, _ = select.select([], [], [], 0.02)
    poll = select.poll()
    for client in crowd:
        poll.register(client, select.POLLIN)
    now = len(poll.poll(0))
    if now == ended and now > 0:
        break
    ended = now
print(f"ready {count - ended}", flush=True)
sys.stdin.read()

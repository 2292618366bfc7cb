// Sends back what it gets; every message goes through a thread of libuv's pool, a timer and a child process (cat).
//
// node echo_node.js PORT ADDRESS...
'use strict';
const crypto = require('crypto');
const net = require('net');
const { spawn } = require('child_process');

const [port, ...addresses] = process.argv.slice(2);
const child = spawn('cat', [], { stdio: ['pipe', 'pipe', 'inherit'] });
const owed = []; // what the child has not sent back yet: {peer, left}, in order

child.on('exit', (code, signal) => {
  console.error(`the child has ended: ${code} ${signal}`);
  process.exit(1);
});
child.stdout.on('data', (data) => {
  while (data.length) {
    const first = owed[0];
    const piece = data.subarray(0, first.left);
    data = data.subarray(piece.length);
    first.left -= piece.length;
    if (!first.left) owed.shift();
    if (!first.peer.destroyed) first.peer.write(piece);
  }
});

function serve(peer) {
  let queue = Promise.resolve();
  peer.setNoDelay(true);
  peer.on('data', (data) => {
    queue = queue.then(() => new Promise((resolve) => {
      crypto.randomBytes(64, () => setTimeout(() => {
        owed.push({ peer, left: data.length });
        child.stdin.write(data, resolve);
      }, 1));
    }));
  });
  peer.on('error', () => peer.destroy());
}

let ticks = 0;
setInterval(() => { ticks += 1; }, 3);
for (const host of addresses) net.createServer(serve).listen({ port: Number(port), host });

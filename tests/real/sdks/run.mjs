// Runs one exercise with the client that a page's snippet makes, in a process that can reach one address only; as run.py.
import net from 'node:net';
import { pathToFileURL } from 'node:url';

const [snippet, exercise, ...allowed] = process.argv.slice(2);
const elsewhere = [];
const connect = net.Socket.prototype.connect;

net.Socket.prototype.connect = function (...given) {
  const [first] = Array.isArray(given[0]) ? given[0] : given;
  const address = `${first.host}:${first.port}`;
  if (!allowed.includes(address)) {
    elsewhere.push(address);
    throw new Error(`${address} is not the broker`);
  }
  return connect.apply(this, given);
};

const names = await import(pathToFileURL(snippet));
const { main } = await import(`./exercise_${exercise}.mjs`);
process.stdout.write(JSON.stringify({ returned: await main(names), elsewhere }));

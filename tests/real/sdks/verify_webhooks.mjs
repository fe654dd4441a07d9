// Verifies deliveries with the lines that a page shows: the snippet's file is the argument, the deliveries come as JSON.
import { pathToFileURL } from 'node:url';

const { verified } = await import(pathToFileURL(process.argv[2]));

let text = '';
for await (const piece of process.stdin) text += piece;
const outcomes = JSON.parse(text).map(({ secret, body, headers }) => {
  try {
    verified(secret, Buffer.from(body, 'base64'), headers);
    return true;
  } catch {
    return false;
  }
});
process.stdout.write(JSON.stringify(outcomes));

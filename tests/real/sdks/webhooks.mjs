// Signs and verifies with the vendors' and the standard's libraries: orders come as JSON on standard input, one answer each goes out.
import { Webhooks } from '@octokit/webhooks';
import { Webhook as Standard } from 'standardwebhooks';
import Stripe from 'stripe';
import { Webhook as Svix } from 'svix';

const stripe = new Stripe('sk_test_unused');

const ways = {
  octokit: {
    sign: async ({ secret, body }) => ({ 'x-hub-signature-256': await new Webhooks({ secret }).sign(body) }),
    verify: async ({ secret, body, headers }) => new Webhooks({ secret }).verify(body, headers['x-hub-signature-256']),
  },
  stripe: {
    sign: async ({ secret, body }) => ({
      'stripe-signature': stripe.webhooks.generateTestHeaderString({ payload: body, secret }),
    }),
    verify: async ({ secret, body, headers }) =>
      Boolean(stripe.webhooks.constructEvent(body, headers['stripe-signature'], secret)),
  },
  standardwebhooks: standard(Standard, 'webhook'),
  svix: standard(Svix, 'svix'),
};

function standard(Webhook, prefix) {
  return {
    sign: async ({ secret, body, id }) => {
      const now = new Date();
      return {
        [`${prefix}-id`]: id,
        [`${prefix}-timestamp`]: String(Math.floor(now / 1000)),
        [`${prefix}-signature`]: new Webhook(secret).sign(id, now, body),
      };
    },
    verify: async ({ secret, body, headers }) => {
      new Webhook(secret).verify(body, headers);
      return true;
    },
  };
}

async function answered({ library, action, ...order }) {
  try {
    return await ways[library][action](order);
  } catch (error) {
    return { refused: error.constructor.name };
  }
}

let text = '';
for await (const piece of process.stdin) text += piece;
process.stdout.write(JSON.stringify(await Promise.all(JSON.parse(text).map(answered))));

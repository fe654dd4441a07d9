// Calls another host, which has to be stopped and told.

export async function main() {
  return fetch(process.env.ELSEWHERE).then(
    () => ({ went_through: true }),
    () => ({ went_through: false }),
  );
}

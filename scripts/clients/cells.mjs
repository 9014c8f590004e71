// The report of cells.py for clients in JavaScript: a line per column of the table in docs/clients.md.
export const server = globalThis.process?.env.SERVER ?? "http://127.0.0.1:8000";
export const key = globalThis.process?.env.KEY ?? "none";
export const prompt = "a red circle on a blue background";

// A mask of 256 × 256 whose middle is transparent: it is repainted.
export const hole =
  "iVBORw0KGgoAAAANSUhEUgAAAQAAAAEAAQMAAABmvDolAAAABlBMVEX///8AAABVwtN+AAAAAnRSTlP/AOW3MEoAAAA1SURBVHja7cwhDgAwCARB" +
  "yv//TG0FCQbXGXdkQwQAAMCO845qjjl9EAgEAoFA8FsAAACw5QLpPAGArCImMwAAAABJRU5ErkJggg==";

export class ClientReport {
  constructor(client, write = console.log) {
    this.client = client;
    this.write = write;
  }
  // Reports `yes` if `block` throws nothing, otherwise what it threw.
  async cell(column, block) {
    let result = "yes";
    try {
      await block();
    } catch (error) {
      result = `no: ${error?.name}: ${String(error?.message ?? error).replace(/\s+/g, " ").slice(0, 300)}`;
    }
    this.write(`${this.client}\t${column}\t${result}`);
  }
  notApplicable(...columns) {
    for (const column of columns) this.write(`${this.client}\t${column}\t–`);
  }
}

export function check(holds, what) {
  if (!holds) throw new Error(`not so: ${what}`);
}

// Waits until `block` throws an error that `matches`, a function that returns what is wrong with it.
export async function refused(block, matches) {
  try {
    await block();
  } catch (error) {
    const wrong = matches(error);
    check(!wrong, wrong);
    return;
  }
  check(false, "the request is refused");
}

export function isPng(base64) {
  return atob(base64.slice(0, 16)).slice(1, 4) === "PNG";
}

async function metric(name, label = "") {
  const text = await (await fetch(`${server}/metrics`, { headers: { "X-API-Key": key } })).text();
  const lines = text.split("\n").filter((line) => line.startsWith(name) && line.includes(label));
  return lines.reduce((sum, line) => sum + Number(line.split(" ").pop()), 0);
}

async function until(holds, what) {
  for (const end = Date.now() + 90_000; !(await holds()); ) {
    check(Date.now() < end, what);
    await new Promise((next) => setTimeout(next, 20));
  }
}

// Starts a request with a signal, aborts it once it is on the device, and checks that the engine cancels it.
export async function cancels(start) {
  const cancelled = () => metric("sds_jobs_total", 'outcome="cancelled"');
  const before = await cancelled();
  const abort = new AbortController();
  const request = start(abort.signal).then(() => "answered", (error) => error);
  await until(async () => (await metric("sds_queue_running")) > 0, "the request is on the device");
  abort.abort();
  await until(async () => (await cancelled()) > before, "the engine cancels the request");
  check((await request) !== "answered", "the client's call fails");
}

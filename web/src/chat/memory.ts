// Small settings in localStorage. A browser that keeps nothing is no reason to fail.

const PREFIX = "openbook.";

export function remembered<T>(name: string, otherwise: T): T {
  try {
    const text = localStorage.getItem(PREFIX + name);
    return text === null ? otherwise : (JSON.parse(text) as T);
  } catch {
    return otherwise;
  }
}

/** Keeps a value; `undefined` and "" forget it. */
export function remember(name: string, value: unknown): void {
  try {
    if (value === undefined || value === "") localStorage.removeItem(PREFIX + name);
    else localStorage.setItem(PREFIX + name, JSON.stringify(value));
  } catch {
    // Private windows of some browsers refuse; the value then lives as long as the page.
  }
}

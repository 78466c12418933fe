// Conversations live in the browser's IndexedDB, one record each: images do not fit elsewhere.
import type { Conversation } from "./conversation";

const STORE = "conversations";

let opened: Promise<IDBDatabase> | undefined;

function database(): Promise<IDBDatabase> {
  opened ??= new Promise((resolve, reject) => {
    const request = indexedDB.open("openbook", 1);
    request.onupgradeneeded = () => request.result.createObjectStore(STORE, { keyPath: "id" });
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
  return opened;
}

async function run<T>(mode: IDBTransactionMode, work: (store: IDBObjectStore) => IDBRequest<T>): Promise<T> {
  const transaction = (await database()).transaction(STORE, mode);
  const request = work(transaction.objectStore(STORE));
  return new Promise((resolve, reject) => {
    transaction.oncomplete = () => resolve(request.result);
    transaction.onabort = () => reject(transaction.error);
  });
}

export const readAll = (): Promise<Conversation[]> => run("readonly", (store) => store.getAll());
export const read = (id: string): Promise<Conversation | undefined> => run("readonly", (store) => store.get(id));
export const write = (conversation: Conversation): Promise<IDBValidKey> =>
  run("readwrite", (store) => store.put(conversation));
export const remove = (id: string): Promise<undefined> => run("readwrite", (store) => store.delete(id));

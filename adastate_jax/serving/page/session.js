// Getting a session: the one of this tab, one to watch, or a new one; and the server's token.

const KEPT = "adastate-session";

export function fragment() {
  return new URLSearchParams(location.hash.slice(1));
}

export function headers() {
  const token = fragment().get("token") ?? sessionStorage.getItem("adastate-token");
  if (token) sessionStorage.setItem("adastate-token", token);
  return token ? { authorization: `Bearer ${token}` } : {};
}

async function answer(response) {
  const found = await response.json().catch(() => ({}));
  if (!response.ok) throw new Error(typeof found.detail === "string" ? found.detail : `the server says ${response.status}`);
  return found;
}

export async function model() {
  return answer(await fetch("/v1/model", { headers: headers() }));
}

// {id, key, watch_key}: of a watch link without watch_key.
export async function obtain() {
  const watched = fragment().get("watch");
  if (watched) {
    const [id, key] = watched.split(".");
    return { id, key };
  }
  const kept = JSON.parse(sessionStorage.getItem(KEPT) ?? "null");
  return kept ?? begin();
}

export async function begin(wanted = {}) {
  const response = await fetch("/v1/sessions", {
    method: "POST",
    headers: { "content-type": "application/json", ...headers() },
    body: JSON.stringify(wanted),
  });
  const found = await answer(response);
  sessionStorage.setItem(KEPT, JSON.stringify(found));
  return found;
}

export function forget() {
  sessionStorage.removeItem(KEPT);
}

export async function upload({ id, key }, file) {
  const response = await fetch(`/v1/sessions/${id}/picture?key=${encodeURIComponent(key)}`, { method: "POST", body: file });
  return (await answer(response)).picture;
}

export function links({ id, key, watch_key }) {
  const base = `/v1/sessions/${id}`;
  const query = `key=${encodeURIComponent(key)}`;
  const watch = watch_key && `${location.origin}/#watch=${id}.${watch_key}`;
  return { video: `${base}/video.mp4?${query}`, session: `${base}/session.json?${query}`, watch };
}

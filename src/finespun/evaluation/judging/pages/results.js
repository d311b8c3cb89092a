// Renews the results, but not under the hands of somebody who reads or copies.
const live = document.getElementById("live");

setInterval(async () => {
  const reading = live.contains(document.activeElement) || live.querySelector("details[open]") || !getSelection().isCollapsed;
  if (document.hidden || reading) return;
  try {
    const response = await fetch(location.href);
    if (!response.ok) return;
    const page = new DOMParser().parseFromString(await response.text(), "text/html");
    live.replaceChildren(...page.getElementById("live").childNodes);
  } catch {
    // the server is away; the next time it may be there
  }
}, 4000);

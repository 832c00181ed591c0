// Keeps the live parts of the page up to date, and does what their buttons say.
(() => {
  const EVERY = 1000, HIDDEN_EVERY = 10000;
  let known = "", timer = null, parts = {};

  // Replaces what a container shows, but keeps children of the same key and contents: a video goes on, focus stays.
  function show(container, html) {
    const focused = container.contains(document.activeElement) && document.activeElement.dataset.key;
    const template = document.createElement("template");
    template.innerHTML = html;
    const old = new Map([...container.children].map((child) => [child.dataset.key, child]));
    const wanted = [...template.content.children].map((child) => {
      const source = child.outerHTML, there = child.dataset.key && old.get(child.dataset.key);
      if (there && there.source === source) return there;
      child.source = source;
      return child;
    });
    wanted.forEach((child, at) => {
      if (container.children[at] !== child) container.insertBefore(child, container.children[at] || null);
    });
    while (container.children.length > wanted.length) container.lastElementChild.remove();
    if (focused && !container.contains(document.activeElement)) {
      const again = container.querySelector(`[data-key="${CSS.escape(focused)}"]`);
      if (again) again.focus();
    }
  }

  function showAll() {
    for (const [name, html] of Object.entries(parts)) {
      const container = document.querySelector(`[data-live="${name}"]`);
      if (!container || container.shown === html) continue;
      show(container, html);
      container.shown = html;
    }
  }

  async function look() {
    clearTimeout(timer);
    try {
      const answer = await fetch(`/live?known=${known}`);
      const told = await answer.json();
      known = told.version;
      Object.assign(parts, told.parts);
      document.body.classList.remove("lost");
    } catch {
      document.body.classList.add("lost");
    }
    showAll();
    timer = setTimeout(look, document.hidden ? HIDDEN_EVERY : EVERY);
  }

  function say(text) {
    const place = document.querySelector("[data-said]");
    if (place) place.textContent = text;
  }

  document.addEventListener("click", async (event) => {
    const button = event.target.closest("[data-post], [data-delete]");
    if (!button) return;
    if (button.dataset.confirm && !confirm(button.dataset.confirm)) return;
    button.disabled = true;
    const method = button.dataset.post ? "POST" : "DELETE";
    try {
      const answer = await fetch(button.dataset.post || button.dataset.delete, { method });
      say(answer.ok ? "" : (await answer.json()).error);
    } catch {
      say("The server does not answer.");
    }
    button.disabled = false;
    look();
  });

  document.addEventListener("visibilitychange", look);
  window.wanLook = look;  // the form calls it when it has sent a job
  // The parts are there once the form is built, and again if it is built anew.
  new MutationObserver(showAll).observe(document.documentElement, { childList: true, subtree: true });
  look();
})();

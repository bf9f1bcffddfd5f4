"use strict";
// Shows the queries and keys of the head that is chosen, where they are drawn.
(() => {
  const $ = (id) => document.getElementById(id);
  const show = () => {
    const head = document.querySelector("#ra-grid [aria-selected=true]")?.dataset.head;
    let found = false;
    for (const one of document.querySelectorAll("[data-latent]")) {
      one.hidden = one.dataset.latent !== `${$("ra-example").value}.${head}`;
      found ||= !one.hidden;
    }
    $("ra-latent-none").hidden = found;
  };
  // The explorer names the head it shows there.
  new MutationObserver(show).observe($("ra-title"), { childList: true });
  show();
})();

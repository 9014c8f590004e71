// What Gradio's components leave out for those who hear or type: names that hold what is seen, fields that say that
// something is wrong with them. Runs once in the page, and again after each change of it.
() => {
  const seen = new WeakSet();

  const name = () => {
    for (const empty of document.querySelectorAll(".empty[aria-label]:not([role])")) empty.setAttribute("role", "img");
    for (const frame of document.querySelectorAll("button:has(> .image-frame):not([aria-label])")) {
      const label = frame.closest(".block")?.querySelector("[data-testid=block-label]")?.textContent.trim();
      frame.setAttribute("aria-label", label || "Picture");
    }
    for (const picture of document.querySelectorAll("button.thumbnail-item")) {
      const caption = picture.querySelector(".caption-label")?.textContent.trim();
      const label = picture.getAttribute("aria-label") ?? "";
      if (caption && !label.startsWith(caption)) picture.setAttribute("aria-label", `${caption}, ${label}`);
    }
  };

  const blame = () => {
    const faults = [...document.querySelectorAll(".sds-fault [data-field]")];
    const blamed = new Map();
    for (const fault of faults) {
      const field = document.getElementById(fault.dataset.field)?.querySelector("input, textarea, button");
      if (field) blamed.set(field, fault);
    }
    for (const field of document.querySelectorAll("[aria-invalid=true]")) {
      if (blamed.has(field)) continue;
      field.removeAttribute("aria-invalid");
      field.removeAttribute("aria-describedby");
    }
    for (const [field, fault] of blamed) {
      field.setAttribute("aria-invalid", "true");
      field.setAttribute("aria-describedby", fault.id);
    }
    const fresh = [...blamed].filter(([, fault]) => !seen.has(fault));
    for (const fault of faults) seen.add(fault);
    if (fresh.length && fresh[0][0].offsetParent) fresh[0][0].focus();
  };

  document.addEventListener("input", ({ target }) => {
    target.closest?.(".sds-compare")?.style.setProperty("--at", `${target.value}%`);
  });

  let asked = false;
  const mend = () => {
    asked = false;
    name();
    blame();
  };
  new MutationObserver(() => {
    if (!asked) requestAnimationFrame(mend);
    asked = true;
  }).observe(document.body, { childList: true, subtree: true });
  mend();
}

// Hide the presets that do not fit the answers given so far; if none fits all of them, show those that fit most.
(function () {
  const form = document.querySelector("form.choose");
  const cards = [...document.querySelectorAll(".choices .card")];
  form.addEventListener("change", function () {
    const given = [...new FormData(form)];
    const fits = cards.map((card) => given.filter(([key, value]) => card.dataset[key].split(" ").includes(value)).length);
    const most = Math.max(...fits);
    cards.forEach((card, i) => (card.hidden = fits[i] < most));
  });
})();

"""The script of the report's controls: choice of a model, order and filter of pairs, playing of videos.

Plain JavaScript inside the page; without it everything is shown, one below the other.
"""

SCRIPT = """
(() => {
  const all = (what, from = document) => [...from.querySelectorAll(what)];
  const press = (buttons, on) => {
    for (const b of buttons) b.setAttribute('aria-pressed', String(b === on));
  };
  document.documentElement.classList.add('live');

  const models = all('button[data-choose]');
  const pick = (button) => {
    press(models, button);
    for (const part of all('.stack > [data-model]'))
      part.classList.toggle('on', part.dataset.model === button.dataset.choose);
    for (const video of all('video')) video.pause();
  };
  for (const b of models) b.addEventListener('click', () => pick(b));
  const chosen = models.find((b) => b.getAttribute('aria-pressed') === 'true');
  if (chosen) pick(chosen);

  const boxes = all('.pairs'), orders = all('button[data-order]');
  const filter = document.querySelector('select');
  const arrange = () => {
    const order = orders.find((b) => b.getAttribute('aria-pressed') === 'true').dataset.order;
    const of = filter ? filter.value : '';
    for (const box of boxes) {
      const pairs = [...box.children];
      const inside = (p) => of ? (p.dataset.of || '').split('\\n').includes(of) : order in p.dataset;
      const place = (p) => {
        if (!of) return Number(p.dataset[order]);
        if (order === 'random') return Number(p.dataset.random ?? 1e9);
        return Number(p.dataset.change) * (order === 'gain' ? -1 : 1);
      };
      for (const p of pairs) p.hidden = !inside(p);
      pairs.filter(inside).sort((a, b) => place(a) - place(b)).forEach((p) => box.append(p));
    }
  };
  for (const b of orders) b.addEventListener('click', () => { press(orders, b); arrange(); });
  if (filter) filter.addEventListener('change', arrange);
  if (orders.length) { press(orders, orders[0]); arrange(); }

  for (const p of all('figure.pair')) {
    const [a, b] = p.querySelectorAll('video');
    if (!b) continue;
    for (const [own, rival] of [[a, b], [b, a]]) {
      own.addEventListener('play', () => {
        if (rival.paused) { rival.currentTime = own.currentTime; rival.play(); }
      });
      own.addEventListener('pause', () => rival.pause());
    }
  }
  const everything = document.querySelector('button[data-play]');
  if (everything) everything.addEventListener('click', () => {
    const on = everything.getAttribute('aria-pressed') !== 'true';
    everything.setAttribute('aria-pressed', String(on));
    const shown = all('.pairs').filter((box) => getComputedStyle(box).visibility === 'visible');
    for (const box of shown)
      for (const video of all('figure:not([hidden]) video', box)) on ? video.play() : video.pause();
  });
})();
"""

// What a reader should know of the model before believing it.

import type { Figure, Model } from "./api";
import { percent } from "./words";

export function ModelCard({ model }: { model: Model }) {
  const { card } = model;
  return (
    <>
      <h2>
        Model card: {model.name} {model.version}
      </h2>
      <p>{model.description}</p>
      {card.synthetic && (
        <div className="verdict refused">
          <h3>Made from drawn phantoms</h3>
          <p>This model has never seen a radiograph. Its answers about real images mean nothing.</p>
        </div>
      )}
      <h3>Intended use</h3>
      <p>{card.intended_use}</p>
      <h3>Limitations</h3>
      <ul>
        {card.limitations.map((one) => (
          <li key={one}>{one}</li>
        ))}
      </ul>
      <h3>How well it does</h3>
      <p>
        On {card.test_images} test images that training has not seen, with 95 % intervals. On images from
        elsewhere it may do worse.
      </p>
      <dl>
        <dt>Accuracy</dt>
        <dd>{figure(card.accuracy)}</dd>
        <dt>Balanced accuracy</dt>
        <dd>{figure(card.balanced_accuracy)}</dd>
        <dt>Expected calibration error</dt>
        <dd>{figure(card.expected_calibration_error)}</dd>
      </dl>
      <div className="scroll" tabIndex={0} role="region" aria-label="Figures of each class">
        <table>
          <thead>
            <tr>
              <th scope="col">Class</th>
              <th scope="col">Sensitivity</th>
              <th scope="col">Specificity</th>
              <th scope="col">ROC AUC</th>
              <th scope="col">Threshold</th>
              <th scope="col">Images</th>
            </tr>
          </thead>
          <tbody>
            {card.classes.map((one) => (
              <tr key={one.label}>
                <th scope="row">{one.label}</th>
                <td>{figure(one.sensitivity)}</td>
                <td>{figure(one.specificity)}</td>
                <td>{figure(one.roc_auc)}</td>
                <td>{percent(one.threshold)}</td>
                <td>{one.images}</td>
              </tr>
            ))}
          </tbody>
        </table>
      </div>
      <h3>What it was made from</h3>
      <p>
        {card.images} images, those for the test included:{" "}
        {Object.entries(card.sources)
          .map(([name, count]) => `${name} (${count})`)
          .join(", ")}
        .
      </p>
      <dl>
        {Object.entries(card.architecture).map(([name, value]) => (
          <div key={name}>
            <dt>{name}</dt>
            <dd>{value}</dd>
          </div>
        ))}
      </dl>
    </>
  );
}

const figure = (one: Figure | null | undefined): string =>
  one ? `${one.value.toFixed(3)} (${one.low.toFixed(3)} to ${one.high.toFixed(3)})` : "not known";
